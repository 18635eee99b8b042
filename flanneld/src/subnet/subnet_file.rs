//! `/run/flannel/subnet.env`: what the CNI plugin (and anybody who sources it in a shell) learns about this node.
//! Written whole or not at all.

use std::io::Write;
use std::path::{Path, PathBuf};

use ipnet::Ipv4Net;

/// The contents of the file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SubnetFile {
    pub network: Ipv4Net,
    /// This node's subnet; in the file the address is that of the bridge, the first of the subnet.
    pub subnet: Ipv4Net,
    pub mtu: u32,
    /// Whether flanneld masquerades, so that the plugin need not.
    pub ip_masq: bool,
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

    /// Reads the variables; fails with the name of the first that is missing or wrong.
    pub fn parse(text: &str) -> Result<Self, &'static str> {
        let value = |name: &str| {
            text.lines().find_map(|line| line.trim().strip_prefix(name)?.strip_prefix('=')).map(|v| v.trim_matches('"'))
        };
        let net = |name: &'static str| value(name).and_then(|v| v.parse::<Ipv4Net>().ok()).ok_or(name);
        Ok(Self {
            network: net("FLANNEL_NETWORK")?.trunc(),
            subnet: net("FLANNEL_SUBNET")?.trunc(),
            mtu: value("FLANNEL_MTU").and_then(|v| v.parse().ok()).ok_or("FLANNEL_MTU")?,
            ip_masq: value("FLANNEL_IPMASQ").and_then(|v| v.parse().ok()).ok_or("FLANNEL_IPMASQ")?,
        })
    }

    pub fn text(&self) -> String {
        let bridge = std::net::Ipv4Addr::from(u32::from(self.subnet.network()).saturating_add(1));
        format!(
            "FLANNEL_NETWORK={}\nFLANNEL_SUBNET={bridge}/{}\nFLANNEL_MTU={}\nFLANNEL_IPMASQ={}\n",
            self.network,
            self.subnet.prefix_len(),
            self.mtu,
            self.ip_masq
        )
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
mod tests {
    use super::*;

    fn file() -> SubnetFile {
        SubnetFile {
            network: "10.244.0.0/16".parse().unwrap(),
            subnet: "10.244.7.0/24".parse().unwrap(),
            mtu: 1450,
            ip_masq: true,
        }
    }

    #[test]
    fn the_text_is_what_upstream_writes_and_reads_back() {
        let text =
            "FLANNEL_NETWORK=10.244.0.0/16\nFLANNEL_SUBNET=10.244.7.1/24\nFLANNEL_MTU=1450\nFLANNEL_IPMASQ=true\n";
        assert_eq!(file().text(), text);
        assert_eq!(SubnetFile::parse(text), Ok(file()));
        assert_eq!(SubnetFile::parse("FLANNEL_NETWORK=10.244.0.0/16\n"), Err("FLANNEL_SUBNET"));
    }

    #[test]
    fn writing_replaces_the_file() {
        let directory = std::env::temp_dir().join(format!("ketch-subnet-file-{}", std::process::id()));
        let path = directory.join("flannel/subnet.env");
        file().write(&path).unwrap();
        let other = SubnetFile { mtu: 1500, ..file() };
        other.write(&path).unwrap();
        assert_eq!(SubnetFile::read(&path).unwrap(), other);
        assert_eq!(std::fs::read_dir(path.parent().unwrap()).unwrap().count(), 1);
        std::fs::remove_dir_all(directory).unwrap();
    }
}
