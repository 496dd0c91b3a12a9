"""`python -m hymba.eval run --model hymba --tasks ...`: the harness's own command line with our classes registered.

`accelerate launch -m hymba.eval run ...` deals the requests out over GPUs. Our tasks are found with
`--include_path "$(python -c 'from hymba.eval import TASKS; print(TASKS)')"`.
"""

from __future__ import annotations

import sys


def main() -> None:
    """Register the model class and hand over to the harness."""
    try:
        from lm_eval.__main__ import cli_evaluate
    except ImportError as error:
        if (error.name or "").partition(".")[0] != "lm_eval":
            raise
        sys.exit("error: lm-evaluation-harness is not installed; pip install 'hymba[eval]' brings it")
    import hymba.eval.harness  # noqa: F401  (registers the name)

    cli_evaluate()


if __name__ == "__main__":
    main()
