"""NIXL: one-sided reads over RDMA, or between processes of one host."""
