//! extension: commands that somebody else provides do the routing; flannel only leases subnets and calls them.

use serde_json::Value;

use crate::commands::{Command, Commands, PeerCommands};
use crate::interface::ExternalInterface;
use crate::lease::{Lease, LeaseAttributes, LeaseSet};
use crate::network::{ExtensionConfig, NetworkConfig};

use super::{Backend, DataPlane, plain_attributes};

pub struct Extension {
    config: ExtensionConfig,
    network: String,
    interface: ExternalInterface,
    /// What the command before the start has printed; peers get it on their commands' standard input.
    data: Option<String>,
}

impl Extension {
    pub fn new(
        config: ExtensionConfig,
        network: &NetworkConfig,
        interface: ExternalInterface,
        data: Option<String>,
    ) -> Self {
        let network = network.pools().next().map(|pool| pool.network.to_string()).unwrap_or_default();
        Self { config, network, interface, data }
    }

    fn startup(&self, own: &Lease) -> Option<Command> {
        let text = |subnet: Option<String>| subnet.unwrap_or_default();
        let environment = [
            ("NETWORK", self.network.clone()),
            ("SUBNET", text(own.subnets.ipv4.map(|subnet| subnet.to_string()))),
            ("IPV6SUBNET", text(own.subnets.ipv6.map(|subnet| subnet.to_string()))),
            ("PUBLIC_IP", own.attributes.public_ip.to_string()),
            ("PUBLIC_IPV6", text(own.attributes.public_ipv6.map(|address| address.to_string()))),
        ];
        Command::new(&self.config.post_startup, &environment, "")
    }
}

impl Backend for Extension {
    fn attributes(&self) -> LeaseAttributes {
        LeaseAttributes {
            backend_data: self.data.clone().map(Value::String),
            ..plain_attributes(&self.interface, "extension")
        }
    }

    fn mtu(&self) -> u32 {
        self.interface.mtu
    }

    fn plan(&self, own: &Lease, peers: &LeaseSet) -> DataPlane {
        let mut commands = Commands { startup: self.startup(own), ..Commands::default() };
        for (subnets, attributes) in peers.iter().filter(|(_, attributes)| attributes.backend_type == "extension") {
            let data = match &attributes.backend_data {
                Some(Value::String(data)) => data.as_str(),
                _ => "",
            };
            let environment = [
                ("SUBNET", subnets.ipv4.map(|subnet| subnet.to_string()).unwrap_or_default()),
                ("IPV6SUBNET", subnets.ipv6.map(|subnet| subnet.to_string()).unwrap_or_default()),
                ("PUBLIC_IP", attributes.public_ip.to_string()),
            ];
            let add = Command::new(&self.config.subnet_add, &environment, data);
            let remove = Command::new(&self.config.subnet_remove, &environment, data);
            commands.peers.insert(*subnets, PeerCommands { add, remove });
        }
        DataPlane { commands, ..DataPlane::default() }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::super::testing::{ipv4_interface, lease, set};
    use super::*;

    #[test]
    fn every_peer_has_its_commands() {
        let network = NetworkConfig::parse(r#"{"Network":"10.244.0.0/16","Backend":{"Type":"host-gw"}}"#).unwrap();
        let config =
            ExtensionConfig { subnet_add: "ip route replace $SUBNET via $PUBLIC_IP".to_owned(), ..Default::default() };
        let backend = Extension::new(config, &network, ipv4_interface(), Some("mine".to_owned()));
        assert_eq!(backend.attributes().backend_data, Some(json!("mine")));
        let own = lease(&["10.244.1.0/24"], &["10.99.0.2"], "extension", None);
        let peers = set(&[
            lease(&["10.244.2.0/24"], &["10.99.0.3"], "extension", Some(json!("theirs"))),
            lease(&["10.244.3.0/24"], &["10.99.0.4"], "vxlan", None),
        ]);
        let commands = backend.plan(&own, &peers).commands;
        assert_eq!((commands.startup.is_none(), commands.peers.len()), (true, 1));
        let peer = commands.peers.values().next().unwrap();
        assert_eq!(peer.add.as_ref().unwrap().words(), ["ip", "route", "replace", "10.244.2.0/24", "via", "10.99.0.3"]);
        assert!(peer.remove.is_none());
    }
}
