"""Record the ids that a model generates."""


class TokenRecorder:
    """A streamer that records the tokens."""

    def __init__(self):
        self.tokens = []

    def put(self, tokens):
        self.tokens += tokens.flatten().tolist()

    def end(self):
        pass
