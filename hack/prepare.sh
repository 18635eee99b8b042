# Sourced by the scripts beside it: installs what is missing on a Debian machine and builds the project.
# shellcheck shell=bash

cd "$(dirname "${BASH_SOURCE[0]}")/.."

# What a cluster and the build need; every name is a Debian package.
packages=(
  busybox-static conntrack containerd containernetworking-plugins curl etcd-client etcd-server gcc iproute2 iptables
  libc6-dev libprotobuf-dev nftables procps protobuf-compiler python3 python3-pip runc util-linux
)

install_packages() {
  local missing=() package
  for package in "$@"; do
    dpkg-query -W -f='${Status}' "$package" 2>/dev/null | grep -q 'ok installed' || missing+=("$package")
  done
  [ ${#missing[@]} = 0 ] && return
  echo "installing ${missing[*]}"
  apt-get update -qq
  # Services are started per node, never on the host: policy-rc.d keeps the packages from starting theirs.
  local policy=/usr/sbin/policy-rc.d made=
  if [ ! -e $policy ]; then printf '#!/bin/sh\nexit 101\n' > $policy; chmod +x $policy; made=1; fi
  DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}" > /dev/null
  [ -z "$made" ] || rm -f $policy
}

need_root() {
  [ "$(id -u)" = 0 ] || { echo "error: namespaces and mounts need root; run it with sudo" >&2; exit 1; }
}

need_cargo() {
  [ ! -e "$HOME/.cargo/env" ] || . "$HOME/.cargo/env"
  command -v cargo > /dev/null || {
    echo "error: cargo is missing. Install Rust (rustup, or a package with the version in rust-toolchain.toml)." >&2
    exit 1
  }
}

# Where cargo puts binaries.
bin_dir() { echo "${CARGO_TARGET_DIR:-target}/release"; }

build_release() {
  need_cargo
  cargo build --release --quiet --bins
}
