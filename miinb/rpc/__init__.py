"""The gRPC contract: `inference.proto`, its generated stubs, and `codec.py`, the only module that knows protobuf."""
