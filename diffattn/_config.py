"""Process-wide choices, read once from the environment and changed through `diffattn.config`."""

import os

BACKENDS = ("auto", "triton", "torch")
COMPILE_MODES = (None, "regional", "full")


class Config:
    """What a user may choose for the whole process.

    Attributes:
        backend: `"auto"` (Triton where it can run, else torch), `"triton"` (Triton or an error) or
            `"torch"` (plain torch everywhere). Environment: `DIFFATTN_BACKEND`.
        compile: what `patch(..., compile=None)` does: `None` (nothing), `"regional"` or `"full"`.
            Environment: `DIFFATTN_COMPILE` (`none`, `regional`, `full`).
        autotune: `False`, or `True` to search for the fastest launch configurations of `linear_attention` and of the
            forward of `gqa_attention` (its plain Triton kernel) where a GPU meets a new size; other kernels have
            tables alone. It takes a minute or so, and what is found is kept in the user's cache folder. Results may
            then differ in their last bits from those of another machine. Environment: `DIFFATTN_AUTOTUNE` (`0`, `1`),
            and `DIFFATTN_CACHE` for the folder.

    Raises: ValueError on any other value, when it is assigned or read from the environment.
    """

    backend: str
    compile: str | None
    autotune: bool

    def __init__(self):
        self.backend = os.environ.get("DIFFATTN_BACKEND", "auto")
        compile_mode = os.environ.get("DIFFATTN_COMPILE", "none")
        self.compile = None if compile_mode == "none" else compile_mode
        autotune = os.environ.get("DIFFATTN_AUTOTUNE", "0")
        self.autotune = {"0": False, "1": True}.get(autotune, autotune)

    def __setattr__(self, name, value):
        allowed = {"backend": BACKENDS, "compile": COMPILE_MODES, "autotune": (False, True)}
        if name not in allowed:
            raise AttributeError(f"diffattn.config has no option {name!r}; it has {', '.join(allowed)}")
        if value not in allowed[name]:
            raise ValueError(f"diffattn.config.{name}: got {value!r}, expected one of {allowed[name]}")
        object.__setattr__(self, name, value)

    def __repr__(self):
        return f"Config(backend={self.backend!r}, compile={self.compile!r}, autotune={self.autotune!r})"


config = Config()
