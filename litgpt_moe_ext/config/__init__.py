"""What a model configuration may say about the plugin's layers. Imports neither torch nor LitGPT."""
