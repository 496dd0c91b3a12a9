"""Training and its parts: settings, corpus, tokenizer, packing, schedule, checkpoints, measurements."""
