"""What others have published: a `config.json`, and the weights beside it in whatever form they are stored."""
