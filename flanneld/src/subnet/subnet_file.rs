//! `/run/flannel/subnet.env`: what the CNI plugin (and anybody who sources it in a shell) learns about this node.
//! Written whole or not at all.

use std::io::Write;
use std::path::{Path, PathBuf};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};

use crate::family::Family;
use crate::lease::Subnets;

/// The contents of the file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SubnetFile {
    pub ipv4: Option<Assignment<Ipv4Net>>,
    pub ipv6: Option<Assignment<Ipv6Net>>,
    pub mtu: u32,
    /// Whether flanneld masquerades, so that the plugin need not.
    pub ip_masq: bool,
}

/// The pod network of one family and this node's part of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Assignment<Net> {
    pub network: Net,
    /// In the file the address is that of the bridge, the first of the subnet.
    pub subnet: Net,
}

#[derive(Debug, thiserror::Error)]
pub enum SubnetFileError {
    #[error("cannot read {path}")]
    Read { path: PathBuf, source: std::io::Error },
    #[error("cannot write {path}")]
    Write { path: PathBuf, source: std::io::Error },
    #[error("{path} has no usable {variable}")]
    Variable { path: PathBuf, variable: &'static str },
}

impl SubnetFile {
    pub fn read(path: &Path) -> Result<Self, SubnetFileError> {
        let text =
            std::fs::read_to_string(path).map_err(|source| SubnetFileError::Read { path: path.to_owned(), source })?;
        Self::parse(&text).map_err(|variable| SubnetFileError::Variable { path: path.to_owned(), variable })
    }

    /// Reads the variables; fails with the name of the first that is missing or wrong. At least one family must be
    /// there.
    pub fn parse(text: &str) -> Result<Self, &'static str> {
        let value = |name: &str| {
            text.lines().find_map(|line| line.trim().strip_prefix(name)?.strip_prefix('=')).map(|v| v.trim_matches('"'))
        };
        let ipv4 = match value("FLANNEL_NETWORK") {
            Some(network) => {
                let net = |text: Option<&str>| text.and_then(|text| text.parse::<Ipv4Net>().ok()).map(|n| n.trunc());
                let subnet = net(value("FLANNEL_SUBNET")).ok_or("FLANNEL_SUBNET")?;
                Some(Assignment { network: net(Some(network)).ok_or("FLANNEL_NETWORK")?, subnet })
            }
            None => None,
        };
        let ipv6 = match value("FLANNEL_IPV6_NETWORK") {
            Some(network) => {
                let net = |text: Option<&str>| text.and_then(|text| text.parse::<Ipv6Net>().ok()).map(|n| n.trunc());
                let subnet = net(value("FLANNEL_IPV6_SUBNET")).ok_or("FLANNEL_IPV6_SUBNET")?;
                Some(Assignment { network: net(Some(network)).ok_or("FLANNEL_IPV6_NETWORK")?, subnet })
            }
            None => None,
        };
        if ipv4.is_none() && ipv6.is_none() {
            return Err("FLANNEL_NETWORK");
        }
        Ok(Self {
            ipv4,
            ipv6,
            mtu: value("FLANNEL_MTU").and_then(|v| v.parse().ok()).ok_or("FLANNEL_MTU")?,
            ip_masq: value("FLANNEL_IPMASQ").and_then(|v| v.parse().ok()).ok_or("FLANNEL_IPMASQ")?,
        })
    }

    pub fn text(&self) -> String {
        let mut text = String::new();
        let ipv4 = self.ipv4.map(|one| ("", IpNet::V4(one.network), IpNet::V4(one.subnet)));
        let ipv6 = self.ipv6.map(|one| ("IPV6_", IpNet::V6(one.network), IpNet::V6(one.subnet)));
        for (infix, network, subnet) in ipv4.into_iter().chain(ipv6) {
            let first = Family::number(subnet.network()).saturating_add(1);
            let bridge = Family::of_net(subnet).address(first).unwrap_or(subnet.network());
            text +=
                &format!("FLANNEL_{infix}NETWORK={network}\nFLANNEL_{infix}SUBNET={bridge}/{}\n", subnet.prefix_len());
        }
        text + &format!("FLANNEL_MTU={}\nFLANNEL_IPMASQ={}\n", self.mtu, self.ip_masq)
    }

    pub fn subnets(&self) -> Subnets {
        Subnets { ipv4: self.ipv4.map(|one| one.subnet), ipv6: self.ipv6.map(|one| one.subnet) }
    }

    /// The pod networks.
    pub fn networks(&self) -> impl Iterator<Item = IpNet> {
        let ipv4 = self.ipv4.map(|one| IpNet::V4(one.network));
        ipv4.into_iter().chain(self.ipv6.map(|one| IpNet::V6(one.network)))
    }

    /// Writes beside the file and renames, so that a reader never sees half of it.
    pub fn write(&self, path: &Path) -> Result<(), SubnetFileError> {
        self.replace(path).map_err(|source| SubnetFileError::Write { path: path.to_owned(), source })
    }

    fn replace(&self, path: &Path) -> std::io::Result<()> {
        let directory = path.parent().unwrap_or(Path::new("."));
        std::fs::create_dir_all(directory)?;
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let temporary = directory.join(format!(".{name}.new"));
        let mut file = std::fs::File::create(&temporary)?;
        file.write_all(self.text().as_bytes())?;
        file.sync_all()?;
        std::fs::rename(&temporary, path)
    }
}

#[cfg(test)]
pub(crate) mod testing {
    use super::*;

    pub fn file() -> SubnetFile {
        SubnetFile {
            ipv4: Some(Assignment {
                network: "10.244.0.0/16".parse().unwrap(),
                subnet: "10.244.7.0/24".parse().unwrap(),
            }),
            ipv6: None,
            mtu: 1450,
            ip_masq: true,
        }
    }

    pub fn dual_stack() -> SubnetFile {
        let (network, subnet) = ("fd00::/48".parse().unwrap(), "fd00:0:0:7::/64".parse().unwrap());
        SubnetFile { ipv6: Some(Assignment { network, subnet }), ..file() }
    }
}

#[cfg(test)]
mod tests {
    use super::testing::{dual_stack, file};
    use super::*;

    #[test]
    fn the_text_is_what_upstream_writes_and_reads_back() {
        let ipv4 = "FLANNEL_NETWORK=10.244.0.0/16\nFLANNEL_SUBNET=10.244.7.1/24\n";
        let ipv6 = "FLANNEL_IPV6_NETWORK=fd00::/48\nFLANNEL_IPV6_SUBNET=fd00:0:0:7::1/64\n";
        let rest = "FLANNEL_MTU=1450\nFLANNEL_IPMASQ=true\n";
        let alone = SubnetFile { ipv4: None, ..dual_stack() };
        for (file, text) in [
            (file(), format!("{ipv4}{rest}")),
            (dual_stack(), format!("{ipv4}{ipv6}{rest}")),
            (alone, format!("{ipv6}{rest}")),
        ] {
            assert_eq!(file.text(), text);
            assert_eq!(SubnetFile::parse(&text), Ok(file));
        }
        assert_eq!(SubnetFile::parse("FLANNEL_NETWORK=10.244.0.0/16\n"), Err("FLANNEL_SUBNET"));
        assert_eq!(SubnetFile::parse(rest), Err("FLANNEL_NETWORK"));
    }

    #[test]
    fn writing_replaces_the_file() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("flannel/subnet.env");
        file().write(&path).unwrap();
        let other = SubnetFile { mtu: 1500, ..file() };
        other.write(&path).unwrap();
        assert_eq!(SubnetFile::read(&path).unwrap(), other);
        assert_eq!(std::fs::read_dir(path.parent().unwrap()).unwrap().count(), 1);
    }
}
