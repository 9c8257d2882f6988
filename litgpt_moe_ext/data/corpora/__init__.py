"""The corpora: their settings, and where their documents are. Imports neither torch nor LitGPT."""
