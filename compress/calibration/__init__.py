"""From text to tokens, streams, second moments and the loss metric."""
