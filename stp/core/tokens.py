"""Address and node tokens (protocol §4). Interface first.

keeper = TokenKeeper(random_bytes)
keeper.seal_retry(addr, original_dcid, new_cid, now) -> bytes
keeper.seal_node(domain, node, now) -> bytes                      for NEW_TOKEN frames
keeper.read(token, addr, dcid, now) -> RetryToken | NodeToken | BadRetry | None
    RetryToken(original_dcid)   address validated; the INIT's DCID is the new CID
    NodeToken(node)             good and now used up; charge it to its node; certificate must name it
    BadRetry                    silence
    None                        no token at all, or a useless one: Retry
"""
