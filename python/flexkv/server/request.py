"""Messages of the reference's wire protocol that its users import by name. None is sent here: the
workers' agents and the daemon's clients talk to the node directly."""
from __future__ import annotations

from dataclasses import dataclass


@dataclass
class UnregisterDPClientRequest:
    dp_client_id: int
