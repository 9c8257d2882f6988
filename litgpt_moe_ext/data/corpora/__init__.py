"""The corpora: what each is, where its documents are, and the settings of both. Imports neither torch nor LitGPT."""
