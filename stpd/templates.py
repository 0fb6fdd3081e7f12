"""The configurations that `stpd init` and `stpd join` write: what a person changes first, and why.

Every key there is stands in config/*.toml; what is left out here has its default. `{{node}}` in these texts
is `{node}` in the file.
"""

from typing import Final

HUB: Final = """\
# stpd as the hub {node}, made by `stpd init hub`. Look it over with: stpd check --config hub.toml
#
# Times have units ("5s", "10m", "72h"), and so have sizes ("512MiB", "10GB").
# Relative paths are relative to this file.

role = "hub"
# What must survive a restart. Under systemd with DynamicUser: /var/lib/stpd-…
state_dir = "{state}"

# Key and certificate; the key that the fleet's handshakes are hidden by.
identity = ["identity.pem", "network.key"]

[listen]
# Where gateways and devices reach this node. UDP.
udp = ["{udp}"]
# The same over TLS, for those whose networks let no UDP through. TCP; enrolment is served there, too.
tls = ["{enrol}"]
# For programs of this machine, without certificates: a node each, named after its user.
#unix = {{ path = "/run/stpd-hub/stp.sock", mode = "0660" }}

[enrol]
# Where they get their certificate with a token from `stpctl keys create`. TCP.
listen = "{enrol}"
# The directory with ca.pem and ca.key. Back ca.key up, offline.
ca = "."

[management]
# HTTPS for stpctl; operators show a certificate. Keep it on loopback, or behind a firewall.
listen = "{management}"

[health]
# Plain HTTP: /health, /ready, /metrics.
listen = "{health}"

[store]
# What is kept on disk until everybody has it. When it is full senders are held back; nothing kept is lost.
budget = "10GB"
# How long messages stay when everybody has them, for readers that start in the past.
retention = "24h"

[log]
level = "info"
format = "json"

# Who may do what. What no rule allows is denied. {{node}} is the name of the peer that asks.

[[access]]
name = "gateways"
role = "gateway"
publish = ["#", "$inbox/#"]
subscribe = ["cmd/{{node}}/#", "{{node}}/cmd/#", "$inbox/{{node}}/#"]

[[access]]
name = "devices"
role = "device"
publish = ["{{node}}/#", "$inbox/#"]
subscribe = ["cmd/{{node}}/#", "{{node}}/cmd/#", "$inbox/{{node}}/#"]

# Those that read what arrives, and send commands.
[[access]]
name = "applications"
role = "app"
publish = ["cmd/#", "+/cmd/#", "$inbox/#"]
subscribe = ["#", "$inbox/{{node}}/#"]
"""

GATEWAY: Final = """\
# stpd as the gateway {node}, made by `stpd join`. Look it over with: stpd check --config gateway.toml
#
# Times have units ("5s", "10m", "72h"), and so have sizes ("512MiB", "1GB").
# Relative paths are relative to this file.

role = "gateway"
# What must survive a restart. Under systemd with DynamicUser: /var/lib/stpd-…
state_dir = "{state}"

# Key, certificate, the fleet's CA and network key. `stpd renew --config gateway.toml` replaces it.
identity = ["identity.pem"]

[listen]
# Where local devices reach this node. UDP. [] to dial only.
udp = ["{udp}"]
# The same over TLS, for those whose networks let no UDP through. TCP; the port may be that of enrolment.
#tls = ["0.0.0.0:8443"]
# For programs of this machine, without certificates: a node each, named after its user.
#unix = {{ path = "/run/stpd-gateway/stp.sock", mode = "0660" }}

[enrol]
# Where local devices get their certificate; the hub decides. TCP. "" for none.
listen = "{enrol}"
forward = "{forward}"

[management]
listen = "{management}"

[health]
# Plain HTTP: /health, /ready, /metrics.
listen = "{health}"

[store]
# What is kept on disk while the hub is out of reach: at 10 messages a second, 1 GB lasts for days.
budget = "1GB"

[log]
level = "info"
format = "json"

# Where messages go. Further [[upstream]] tables are its backups.
[[upstream]]
url = "{upstream}"
# What comes down from there, as far as its access rules let it.
subscribe = ["cmd/{{node}}/#", "{{node}}/cmd/#", "$inbox/{{node}}/#"]

# Who may do what here. What no rule allows is denied. {{node}} is the name of the peer that asks.
[[access]]
name = "devices"
nodes = ["*"]
publish = ["#", "$inbox/#"]
subscribe = ["#", "$inbox/{{node}}/#"]
"""
