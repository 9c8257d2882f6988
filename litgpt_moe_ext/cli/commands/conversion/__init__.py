"""Commands that write a checkpoint in another form."""
