"""What the environment must be before LitGPT and Lightning are imported, which read it meanwhile."""

import os

from litgpt_moe_ext.errors import SettingsError

# In the order in which Lightning looks for the number of this process: it takes the first that is set.
_RANKS = ("RANK", "LOCAL_RANK", "SLURM_PROCID", "JSM_NAMESPACE_RANK")


def prepare_environment() -> None:
    """Set what LitGPT's packages need, and refuse what Lightning cannot read.

    Raises:
        SettingsError: If the number of this process is none, as after `export RANK=$SLURM_PROCID` without srun.
    """
    # litdata, which LitGPT imports, otherwise asks the package index for its newest version and waits if it is offline.
    os.environ.setdefault("LITDATA_DISABLE_VERSION_CHECK", "1")
    name = next((name for name in _RANKS if name in os.environ), None)
    rank = "0" if name is None else os.environ[name]
    if not (rank.isascii() and rank.isdecimal()):
        raise SettingsError(
            f"environment: {name}: {rank!r} must be a whole number from 0; `unset {name}` where nothing has started "
            "this process as one of several"
        )
