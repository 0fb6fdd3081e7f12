"""Which node a local user is: the rules of `listen.unix.map`, applied to what the kernel says (protocol §11).

(1) The first rule that fits decides. A user whom none fits, or whose name makes no node name, is nobody.
(2) Nobody becomes this node itself.
"""

from __future__ import annotations

import grp
import pwd
from collections.abc import Sequence

from stp.carriers.unix import Credentials
from stp.identity import IdentityError, check_node_name
from stpd.schema import LocalName


def user_name(uid: int) -> str:
    """The user's name, or the number where it has none."""
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


def group_id(group: str) -> int:
    """-1 for "". Raises OSError for a group that is not there."""
    if not group:
        return -1
    try:
        return int(group) if group.isdecimal() else grp.getgrnam(group).gr_gid
    except KeyError:
        raise OSError(f"there is no group {group}: see listen.unix.group") from None


def name_of(found: Credentials, rules: Sequence[LocalName], own: str) -> str | None:
    """The node name of who has these credentials; None: nobody's."""
    user = user_name(found.uid)
    for rule in rules:
        if rule.user not in ("*", user, str(found.uid)) or not _in_group(rule.group, found):
            continue
        node = rule.node.replace("{user}", user)
        try:
            check_node_name(node)
        except IdentityError:
            return None
        return node if node != own else None
    return None


def _in_group(group: str, found: Credentials) -> bool:
    if group == "*":
        return True
    try:
        return group_id(group) in found.groups
    except OSError:
        return False
