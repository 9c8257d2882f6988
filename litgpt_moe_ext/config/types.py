"""The type of a model configuration, and the check of one of its fields.

Imports neither torch nor LitGPT.
"""

from typing import TYPE_CHECKING, Any, get_type_hints, is_typeddict

from litgpt_moe_ext.errors import SettingsError
from litgpt_moe_ext.field_types import checked, refusal

if TYPE_CHECKING:
    import litgpt

    class Config(litgpt.Config):
        """A `litgpt.Config` with the fields that this package adds, for annotations."""

        # None only until a configuration is resolved.
        router_type: Any
        head_size: Any
        n_query_groups: Any
        n_shared_expert: Any
        attention_scores_scalar: Any
        intermediate_size: Any
        moe_intermediate_size: Any
        n_expert_groups: Any
        n_topk_groups: Any
        n_topk_scores_per_group: Any
        padded_vocab_size: Any
        rope_n_elem: Any

        def __getattr__(self, name: str) -> Any:
            """Return the value of an added field."""


_TOO_LARGE = 2**31


def check_field(name: str, value: Any, annotation: Any, remedy: str = "") -> None:
    """Raise SettingsError unless a field of a model has its type; an integer must also be a possible tensor size.

    Args:
        name: The field, for the message.
        value: Its value.
        annotation: Its type.
        remedy: The remedy, for the end of the message.
    """
    try:
        found = checked(name, value, annotation)
    except SettingsError as error:
        raise SettingsError(f"{error}{remedy}") from None
    if is_typeddict(annotation):
        for key, kind in get_type_hints(annotation).items():
            if key in value:
                check_field(f"{name}.{key}", value[key], kind, remedy)
    elif isinstance(found, int) and (isinstance(value, float) or found >= _TOO_LARGE):
        limit = " and below 2**31" if found >= _TOO_LARGE else ""
        raise SettingsError(f"{refusal(name, value, annotation)}{limit}{remedy}")
