"""Speculative speculative decoding for vLLM, as a plugin: `--speculative-config saguaro`.

vLLM imports this package in every process of everyone who installed it, whether they use the method or not. So the
package itself imports the standard library only, and `register()` changes nothing for those who do not ask for the
method.
"""

__version__ = "0.1.0"

__all__ = ["__version__", "register"]


def register() -> None:
    """Entry point `vllm.general_plugins: saguaro`; vLLM calls it, perhaps often, in each of its processes.

    It opens two doors in `EngineArgs`, which hand everything through until someone asks for the method. A process that
    has not loaded `vllm.engine.arg_utils` gets its configuration from one that has, already translated: nothing to do.
    """
    import sys

    arg_utils = sys.modules.get("vllm.engine.arg_utils")
    engine_args = getattr(arg_utils, "EngineArgs", None)
    if engine_args is None:
        return
    from vllm_saguaro.vllm_hooks.engine_args import open_doors

    open_doors(engine_args)
