//! Routes: which way an address is reached, which routes can be flannel's, and setting and deleting them.

use std::collections::BTreeSet;
use std::net::IpAddr;

use futures::TryStreamExt;
use ipnet::IpNet;
use rtnetlink::RouteMessageBuilder;
use rtnetlink::packet_route::route::{RouteFlags, RouteHeader, RouteMessage, RouteProtocol, RouteScope, RouteType};

use super::messages::{destination, gateway, metric, output_interface, preferred_source};
use super::{Kernel, KernelError, Way, address_family, list};
use crate::backend::{Route, Via};
use crate::family::Family;

/// Behind every other route to the same subnet: a bridge's own route comes first.
const BLACKHOLE_METRIC: u32 = 1 << 30;

/// What the kernel's routes are compared by: our devices in the order of the plan, and the external interface.
#[derive(Clone, Debug)]
pub struct Interfaces<'a> {
    pub devices: &'a [Option<u32>],
    pub underlay: u32,
}

impl Kernel {
    /// The way of packets to `destination`, if there is a route.
    pub async fn way_to(&self, destination: IpAddr) -> Result<Option<Way>, KernelError> {
        let builder = RouteMessageBuilder::<IpAddr>::new()
            .destination_prefix(destination, Family::of(destination).bits())
            .map_err(|_| KernelError::RouteMessage(destination.into()))?;
        let mut message = builder.build();
        message.header.table = RouteHeader::RT_TABLE_UNSPEC;
        let mut answer = self.handle.route().get(message).execute();
        match answer.try_next().await {
            Ok(route) => Ok(route.and_then(|route| {
                let index = output_interface(&route)?;
                Some(Way { index, source: preferred_source(&route) })
            })),
            Err(rtnetlink::Error::NetlinkError(_)) => Ok(None),
            Err(source) => Err(KernelError::List { what: "the route to an address", source }),
        }
    }

    /// The interface of the default route with the lowest metric.
    pub async fn default_interface(&self, family: Family) -> Result<Option<u32>, KernelError> {
        let routes = self.routes(family).await?;
        let defaults = routes.iter().filter(|route| route.header.destination_prefix_length == 0);
        let best = defaults.filter(|route| output_interface(route).is_some()).min_by_key(|route| metric(route));
        Ok(best.and_then(output_interface))
    }

    /// The routes that flannel could have made into these networks.
    pub async fn flannel_routes(
        &self,
        networks: &[IpNet],
        interfaces: &Interfaces<'_>,
    ) -> Result<BTreeSet<(IpNet, Route)>, KernelError> {
        let mut found = BTreeSet::new();
        for &network in networks {
            let routes = self.routes(Family::of_net(network)).await?;
            found.extend(routes.iter().filter_map(|route| flannel_route(route, network, interfaces)));
        }
        Ok(found)
    }

    pub async fn set_route(
        &self,
        subnet: IpNet,
        route: Route,
        interfaces: &Interfaces<'_>,
    ) -> Result<Result<(), rtnetlink::Error>, KernelError> {
        let request = self.handle.route().add(route_message(subnet, route, interfaces)?);
        // A bridge has the same subnet: what must not be replaced is only added.
        let request = if route.via == Via::Blackhole { request } else { request.replace() };
        Ok(request.execute().await)
    }

    pub async fn delete_route(
        &self,
        subnet: IpNet,
        route: Route,
        interfaces: &Interfaces<'_>,
    ) -> Result<Result<(), rtnetlink::Error>, KernelError> {
        Ok(self.handle.route().del(route_message(subnet, route, interfaces)?).execute().await)
    }

    async fn routes(&self, family: Family) -> Result<Vec<RouteMessage>, KernelError> {
        let mut query = RouteMessageBuilder::<IpAddr>::new().build();
        query.header.address_family = address_family(family);
        let routes = self.handle.route().get(query).execute();
        let main = routes.try_filter(|route| {
            let main = route.header.table == RouteHeader::RT_TABLE_MAIN;
            std::future::ready(main)
        });
        main.try_collect().await.map_err(list("routes"))
    }
}

/// The route as one that flannel could have made. On the external interface that is a route through a gateway to a
/// part of the network that is more than a host; on our own devices it is every route that the kernel did not make.
fn flannel_route(message: &RouteMessage, network: IpNet, interfaces: &Interfaces<'_>) -> Option<(IpNet, Route)> {
    let subnet = destination(message)?;
    if !network.contains(&subnet) || subnet.prefix_len() == Family::of_net(subnet).bits() {
        return None;
    }
    let gateway = gateway(message);
    if message.header.kind == RouteType::BlackHole {
        let ours = metric(message) == BLACKHOLE_METRIC;
        return ours.then_some((subnet, Route { gateway: None, via: Via::Blackhole }));
    }
    let index = output_interface(message)?;
    let own = interfaces.devices.iter().position(|device| *device == Some(index));
    if let Some(number) = own.filter(|_| message.header.protocol != RouteProtocol::Kernel) {
        return Some((subnet, Route { gateway, via: Via::Device(number) }));
    }
    let ours = index == interfaces.underlay && gateway.is_some() && subnet != network;
    ours.then_some((subnet, Route { gateway, via: Via::Underlay }))
}

fn route_message(subnet: IpNet, route: Route, interfaces: &Interfaces<'_>) -> Result<RouteMessage, KernelError> {
    let wrong = |_| KernelError::RouteMessage(subnet);
    let mut builder = RouteMessageBuilder::<IpAddr>::new()
        .destination_prefix(subnet.network(), subnet.prefix_len())
        .map_err(wrong)?
        .protocol(RouteProtocol::Boot);
    let index = match route.via {
        Via::Device(number) => interfaces.devices.get(number).copied().flatten(),
        Via::Underlay => Some(interfaces.underlay),
        Via::Blackhole => {
            return Ok(builder.kind(RouteType::BlackHole).priority(BLACKHOLE_METRIC).build());
        }
    };
    builder = builder.output_interface(index.ok_or(KernelError::RouteMessage(subnet))?);
    let Some(gateway) = route.gateway else {
        return Ok(builder.scope(RouteScope::Link).build());
    };
    let mut message = builder.gateway(gateway).map_err(wrong)?.scope(RouteScope::Universe).build();
    if matches!(route.via, Via::Device(_)) {
        message.header.flags |= RouteFlags::Onlink;
    }
    Ok(message)
}

#[cfg(test)]
mod tests {
    use super::*;

    const INTERFACES: Interfaces<'static> = Interfaces { devices: &[Some(7)], underlay: 2 };

    fn net(text: &str) -> IpNet {
        text.parse().unwrap()
    }

    fn recognised(subnet: &str, route: Route, network: &str) -> Option<(IpNet, Route)> {
        flannel_route(&route_message(net(subnet), route, &INTERFACES).unwrap(), net(network), &INTERFACES)
    }

    #[test]
    fn what_is_set_is_recognised_again() {
        let via = |gateway: &str, via| Route { gateway: gateway.parse().ok(), via };
        for (subnet, route, network) in [
            ("10.244.2.0/24", via("10.244.2.0", Via::Device(0)), "10.244.0.0/16"),
            ("10.244.2.0/24", via("10.99.0.3", Via::Underlay), "10.244.0.0/16"),
            ("fd00:2::/64", via("fd00:2::", Via::Device(0)), "fd00::/16"),
            ("fd00:2::/64", via("fd99::3", Via::Underlay), "fd00::/16"),
            ("10.244.0.0/16", via("", Via::Device(0)), "10.244.0.0/16"),
            ("10.244.1.0/24", via("", Via::Blackhole), "10.244.0.0/16"),
        ] {
            assert_eq!(recognised(subnet, route, network), Some((net(subnet), route)), "{subnet} {route:?}");
        }
    }

    #[test]
    fn other_routes_are_nobodys_business() {
        let underlay = |gateway: &str| Route { gateway: gateway.parse().ok(), via: Via::Underlay };
        for (subnet, route) in [
            ("10.245.2.0/24", underlay("10.99.0.3")),
            ("10.244.2.7/32", underlay("10.99.0.3")),
            ("10.244.0.0/16", underlay("10.99.0.3")),
            ("10.244.2.0/24", underlay("")),
        ] {
            assert_eq!(recognised(subnet, route, "10.244.0.0/16"), None, "{subnet} {route:?}");
        }
        let mut kernels = route_message(net("10.244.2.0/24"), underlay("10.99.0.3"), &INTERFACES).unwrap();
        kernels.attributes.clear();
        assert_eq!(flannel_route(&kernels, net("10.244.0.0/16"), &INTERFACES), None);
    }
}
