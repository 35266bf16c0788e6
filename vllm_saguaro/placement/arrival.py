"""How a draft side that was invited comes to the target side, wherever that is."""

from __future__ import annotations

from vllm_saguaro.placement.meeting import Invitation
from vllm_saguaro.placement.network_end import NetworkEnd
from vllm_saguaro.placement.passed_memory import PassedMemoryEnd


def come(invitation: Invitation) -> NetworkEnd | PassedMemoryEnd:
    """The draft side's end of the link. Raises `Refused` or `OSError` where the target side does not let us in."""
    return NetworkEnd(invitation) if invitation.port else PassedMemoryEnd(invitation)
