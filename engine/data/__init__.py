"""From a user's records to rows of token ids with a loss mask: reading, chat templates, packing, streams, batches."""
