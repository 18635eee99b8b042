//! What a backend needs beside its configuration, found or made once when the daemon starts: hardware addresses that
//! the other nodes know, this node's key, and what the extension's first command prints.

use std::collections::BTreeMap;
use std::path::Path;

use crate::commands::{Command, CommandError};
use crate::family::Family;
use crate::kernel::{Kernel, KernelError};
use crate::keys::{KeyError, PrivateKey};
use crate::mac::Mac;
use crate::network::{BackendConfig, NetworkConfig};

use super::Vxlan;

#[derive(Clone, Debug, Default)]
pub struct Prepared {
    pub macs: BTreeMap<Family, Mac>,
    pub wireguard_key: Option<PrivateKey>,
    pub extension_data: Option<String>,
}

#[derive(Debug, thiserror::Error)]
pub enum PrepareError {
    #[error("cannot look for devices that exist")]
    Kernel(#[from] KernelError),
    #[error("cannot get this node's key")]
    Key(#[from] KeyError),
    #[error("PreStartupCommand failed")]
    Command(#[from] CommandError),
}

impl Prepared {
    /// `stored` are the hardware addresses of the lease that this node had before, so that its peers need not learn
    /// new ones. A device that exists comes first: packets may be flowing.
    pub async fn gather(
        network: &NetworkConfig,
        kernel: &Kernel,
        stored: &BTreeMap<Family, Mac>,
        key_file: &Path,
    ) -> Result<Self, PrepareError> {
        let mut prepared = Self::default();
        match &network.backend {
            BackendConfig::Vxlan(config) => {
                for family in network.families() {
                    let existing = kernel.mac_of(&Vxlan::device_name(family, config.vni)).await?;
                    let mac = existing.or(stored.get(&family).copied()).unwrap_or_else(Mac::random);
                    prepared.macs.insert(family, mac);
                }
            }
            BackendConfig::Wireguard(_) => prepared.wireguard_key = Some(PrivateKey::load_or_create(key_file)?),
            BackendConfig::Extension(config) => {
                if let Some(command) = Command::new(&config.pre_startup, &[], "") {
                    prepared.extension_data = Some(command.run().await?);
                }
            }
            _ => {}
        }
        Ok(prepared)
    }
}
