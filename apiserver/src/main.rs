//! The kube-apiserver binary: flags in, server out.

fn main() {}
