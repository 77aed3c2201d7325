"""Whether the Hugging Face Hub answers, found out in seconds."""

from __future__ import annotations

import socket
import urllib.parse
import urllib.request

CONNECT_SECONDS = 3.0


def hub_is_reachable() -> bool:
    """True when the Hub (or the proxy in front of it) accepts a connection within 3 seconds.

    Left to themselves the Hub's libraries retry an unreachable server for about twenty seconds.
    Where the answer is no, they are set to offline mode for the rest of this process, so that
    what is in their cache still loads, and at once.
    """
    import huggingface_hub.constants as hub

    if hub.HF_HUB_OFFLINE:
        return False
    server = urllib.parse.urlparse(hub.ENDPOINT)
    proxy = urllib.request.getproxies().get(server.scheme)
    if proxy is not None and not urllib.request.proxy_bypass(server.hostname or ""):
        server = urllib.parse.urlparse(proxy)
    port = server.port or (443 if server.scheme == "https" else 80)
    try:
        socket.create_connection((server.hostname, port), timeout=CONNECT_SECONDS).close()
    except OSError:
        hub.HF_HUB_OFFLINE = True
        return False
    return True
