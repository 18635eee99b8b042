//! udp: a tun device whose packets this process carries over UDP, for kernels without vxlan. Slower than the others,
//! and the only backend that needs the daemon to run for packets to flow.
//!
//! The whole network is routed to the device; which node a packet goes to is decided by the process.

use std::net::{IpAddr, Ipv4Addr, SocketAddrV4};

use ipnet::IpNet;

use crate::family::{Family, host};
use crate::interface::ExternalInterface;
use crate::lease::{Lease, LeaseAttributes, LeaseSet};

use super::{
    Backend, BackendError, DataPlane, Device, DeviceKind, DevicePlane, Route, Tables, Via, endpoint, inner_mtu,
    plain_attributes,
};

/// Outer IP and UDP headers.
const OVERHEAD: u32 = 28;
const DEVICE: &str = "flannel0";

pub struct Udp {
    network: IpNet,
    interface: ExternalInterface,
    local: SocketAddrV4,
    mtu: u32,
}

impl Udp {
    pub fn new(port: u16, network: IpNet, interface: ExternalInterface) -> Result<Self, BackendError> {
        let mtu = inner_mtu("udp", interface.mtu, OVERHEAD)?;
        let IpAddr::V4(address) = endpoint(&interface, Family::V4)?.address.addr() else {
            return Err(BackendError::NoEndpoint(Family::V4));
        };
        Ok(Self { network, interface, local: SocketAddrV4::new(address, port), mtu })
    }
}

impl Backend for Udp {
    /// Upstream's udp publishes no type, and neither program looks at it.
    fn attributes(&self) -> LeaseAttributes {
        plain_attributes(&self.interface, "")
    }

    fn mtu(&self) -> u32 {
        self.mtu
    }

    fn plan(&self, own: &Lease, peers: &LeaseSet) -> DataPlane {
        let mut tables = Tables::default();
        for (subnets, attributes) in peers {
            let usable =
                !attributes.public_ip.is_unspecified() && ["", "udp"].contains(&attributes.backend_type.as_str());
            if let Some(subnet) = subnets.ipv4.filter(|_| usable) {
                tables.tunnel.insert(subnet, SocketAddrV4::new(attributes.public_ip, self.local.port()));
            }
        }
        let address = own.subnets.ipv4.map_or(Ipv4Addr::UNSPECIFIED, |subnet| subnet.network());
        let device = Device {
            name: DEVICE.to_owned(),
            mtu: self.mtu,
            addresses: [host(address.into())].into(),
            kind: DeviceKind::Tun { local: self.local, address },
        };
        DataPlane {
            routed: true,
            devices: vec![DevicePlane { device, tables }],
            routes: [(self.network, Route { gateway: None, via: Via::Device(0) })].into(),
            ..DataPlane::default()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{ipv4_interface, lease, routes, set};
    use super::*;

    #[test]
    fn the_network_goes_to_the_device_and_subnets_to_nodes() {
        let backend = Udp::new(8285, "10.244.0.0/16".parse().unwrap(), ipv4_interface()).unwrap();
        assert_eq!(
            serde_json::to_string(&backend.attributes()).unwrap(),
            r#"{"PublicIP":"10.99.0.2","PublicIPv6":null}"#
        );
        let own = lease(&["10.244.1.0/24"], &["10.99.0.2"], "", None);
        let peers = set(&[
            lease(&["10.244.2.0/24"], &["10.99.0.3"], "", None),
            lease(&["10.244.3.0/24"], &["10.99.0.4"], "vxlan", None),
        ]);
        let plane = backend.plan(&own, &peers);
        assert_eq!(routes(&plane), [("10.244.0.0/16".to_owned(), None, Via::Device(0))]);
        let tunnel = [("10.244.2.0/24".parse().unwrap(), "10.99.0.3:8285".parse().unwrap())].into();
        assert_eq!((&plane.devices[0].tables.tunnel, plane.devices[0].device.mtu), (&tunnel, 1472));
    }
}
