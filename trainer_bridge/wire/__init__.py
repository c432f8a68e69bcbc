"""What the two ends of the bridge share: messages, their limits, their bytes, sockets and keys.

Knows bytes, fields and connections. Does not know what a client or a gateway does with a message.

`limits`: every limit. `messages`: one class per message. `codec`: typed and bounded MessagePack. `records`: requests
and trajectories as bytes. `manifest`: a weight version as a list of tensors. `sockets`, `client_socket`,
`gateway_socket`: ZeroMQ. `keys`: CURVE keys. `key_files`: a directory of them.
"""
