"""Every error a user can meet: what it was about, what was given, what is needed."""


class MoertError(Exception):
    """Base of all errors that moert raises on purpose."""


class ConfigError(MoertError, ValueError):
    """A model description that contradicts itself, or an option with a value outside its list."""


class WeightsError(MoertError, ValueError):
    """Weights that are missing, misshapen, of another dtype, or that a checkpoint does not hold."""


class InputError(MoertError, ValueError):
    """A call whose tensors do not fit; nothing was launched and nothing was changed."""


class UnsupportedError(MoertError, NotImplementedError):
    """A valid request that no available backend can serve; the message lists what is supported."""


class StateError(MoertError, RuntimeError):
    """A runtime used in a state that forbids it: closed, forked, copied, or inside a capture."""
