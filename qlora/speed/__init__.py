"""How the decoder runs fast in training, in how much memory; nothing here changes what is computed."""
