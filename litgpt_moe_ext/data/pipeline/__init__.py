"""From files of any kind to token shards. Imports neither torch nor LitGPT."""
