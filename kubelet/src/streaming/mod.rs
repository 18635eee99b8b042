//! Exec, attach and port-forward sessions.
