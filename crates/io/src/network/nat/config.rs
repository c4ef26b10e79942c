//! What a guest's network looks like from inside, and what the operator lets it reach.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, UdpSocket};
use std::os::fd::OwnedFd;

use crate::network::Mac;

/// The network of each guest: the same for all, as none sees another's.
pub const GATEWAY: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 2);
pub const RESOLVER: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 3);
pub const GUEST: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 15);
pub const NETMASK: Ipv4Addr = Ipv4Addr::new(255, 255, 255, 0);
pub const BROADCAST: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 255);
/// RFC 4193: a prefix of our own making.
pub const PREFIX6: Ipv6Addr = Ipv6Addr::new(0xfd72, 0x7a65, 0x726f, 2, 0, 0, 0, 0);
pub const GATEWAY6: Ipv6Addr = Ipv6Addr::new(0xfd72, 0x7a65, 0x726f, 2, 0, 0, 0, 2);
pub const RESOLVER6: Ipv6Addr = Ipv6Addr::new(0xfd72, 0x7a65, 0x726f, 2, 0, 0, 0, 3);
pub const ROUTER6: Ipv6Addr = Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 2);
/// The card of the gateway, and of all that is behind it.
pub const ROUTER: Mac = Mac([0x02, 0x72, 0x7a, 0, 0, 1]);
/// A name for the host: RFC 8375 and ICANN leave `internal` to everybody's own use.
pub const HOST_NAME: &str = "host.ringzero.internal";

pub const DNS_PORT: u16 = 53;

/// Addresses that a guest may reach, at a port or at all of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rule {
    pub network: IpAddr,
    pub prefix: u8,
    pub port: Option<u16>,
}

impl Rule {
    fn allows(&self, target: SocketAddr) -> bool {
        let bits = |address: IpAddr| match address {
            IpAddr::V4(address) => (u128::from(u32::from(address)) << 96, true),
            IpAddr::V6(address) => (u128::from(address), false),
        };
        let ((network, is_v4), (address, target_is_v4)) = (bits(self.network), bits(target.ip()));
        let mask = u128::MAX.checked_shl(128 - u32::from(self.prefix.min(128))).unwrap_or(0);
        is_v4 == target_is_v4 && network & mask == address & mask && self.port.is_none_or(|port| port == target.port())
    }
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Policy {
    /// All there is, without a list.
    pub rules: Option<Vec<Rule>>,
    /// Names may be asked for.
    pub names: bool,
    /// The gateway's address stands for the host's 127.0.0.1.
    pub host_loopback: bool,
}

/// A port of the host that leads to one of the guest.
#[derive(Debug)]
pub enum Forward {
    Tcp(TcpListener, u16),
    Udp(UdpSocket, u16),
}

/// Connections to an address go to somebody on the host: each as a socket, over this one.
#[derive(Debug)]
pub struct Service {
    pub address: SocketAddr,
    pub socket: OwnedFd,
}

#[derive(Debug)]
pub struct Config {
    pub policy: Policy,
    /// The host's own name servers.
    pub resolvers: Vec<SocketAddr>,
    /// Whether the host has a way into the Internet over IPv6.
    pub has_ipv6: bool,
    pub mtu: u16,
    /// What the guest is told to call itself.
    pub name: String,
    pub forwards: Vec<Forward>,
    pub services: Vec<Service>,
}

/// Where what a guest sends to an address goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    To(SocketAddr),
    /// To one of [`Config::services`].
    Service(usize),
    Refused,
}

impl Config {
    /// Whether a guest may send from an address.
    #[must_use]
    pub fn is_guests(address: IpAddr) -> bool {
        match address {
            IpAddr::V4(address) => {
                let is_near = u32::from(address) & u32::from(NETMASK) == u32::from(GATEWAY) & u32::from(NETMASK);
                is_near && ![GATEWAY, RESOLVER, BROADCAST, Ipv4Addr::new(10, 0, 2, 0)].contains(&address)
            }
            IpAddr::V6(address) => is_near6(address) && ![GATEWAY6, RESOLVER6, ROUTER6, PREFIX6].contains(&address),
        }
    }

    #[must_use]
    pub fn is_gateway(address: IpAddr) -> bool {
        [IpAddr::V4(GATEWAY), IpAddr::V6(GATEWAY6), IpAddr::V6(ROUTER6)].contains(&address)
    }

    #[must_use]
    pub fn is_resolver(address: IpAddr) -> bool {
        [IpAddr::V4(RESOLVER), IpAddr::V6(RESOLVER6)].contains(&address)
    }

    /// Where a guest's connection or datagram to `target` goes.
    #[must_use]
    pub fn way(&self, target: SocketAddr) -> Way {
        if let Some(index) = self.services.iter().position(|service| service.address == target) {
            return Way::Service(index);
        }
        if Config::is_resolver(target.ip()) && target.port() == DNS_PORT {
            return match self.resolvers.first() {
                Some(resolver) if self.policy.names => Way::To(*resolver),
                _ => Way::Refused,
            };
        }
        if Config::is_gateway(target.ip()) && self.policy.host_loopback {
            let loopback: IpAddr =
                if target.is_ipv4() { Ipv4Addr::LOCALHOST.into() } else { Ipv6Addr::LOCALHOST.into() };
            return Way::To(SocketAddr::new(loopback, target.port()));
        }
        let allowed = self.policy.rules.as_ref().is_none_or(|rules| rules.iter().any(|rule| rule.allows(target)));
        if allowed && target.port() != 0 && is_outside(target.ip()) { Way::To(target) } else { Way::Refused }
    }

    /// Whether a guest may ask an address for an echo.
    #[must_use]
    pub fn may_ping(&self, target: IpAddr) -> bool {
        let target = SocketAddr::new(target, 0);
        let rules = self.policy.rules.as_ref();
        let allowed = rules.is_none_or(|rules| rules.iter().any(|rule| rule.port.is_none() && rule.allows(target)));
        allowed && is_outside(target.ip())
    }
}

fn is_near6(address: Ipv6Addr) -> bool {
    let near = u128::from(address) >> 64 == u128::from(PREFIX6) >> 64;
    near || address.is_unicast_link_local()
}

/// Whether an address may name a machine that is not this host, or not only. What means the host itself (127/8, 0/8), this
/// link's own services (169.254/16, where a cloud tells a host its secrets), several machines or the guest's own network is
/// never let out, in either version's spelling.
fn is_outside(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(address) => {
            let first = address.octets()[0];
            first != 0
                && first != 127
                && first < 224
                && !address.is_link_local()
                && u32::from(address) & u32::from(NETMASK) != u32::from(GATEWAY) & u32::from(NETMASK)
        }
        IpAddr::V6(address) => {
            // Mapped and compatible addresses (RFC 4291, 2.5.5), which the system may take for IPv4; `::` and `::1` are
            // among the latter. RFC 6052, 2.1: the well-known prefix of translators; RFC 3056: 6to4.
            let is_v4 = u128::from(address) >> 32 == 0 || address.to_ipv4_mapped().is_some();
            let translated = address.segments()[..2] == [0x64, 0xff9b] || address.segments()[0] == 0x2002;
            !is_v4 && !translated && !address.is_multicast() && !is_near6(address)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(policy: Policy) -> Config {
        Config {
            policy,
            resolvers: vec!["127.0.0.53:53".parse().unwrap()],
            has_ipv6: true,
            mtu: 1500,
            name: String::new(),
            forwards: Vec::new(),
            services: Vec::new(),
        }
    }

    fn way(config: &Config, target: &str) -> Way {
        config.way(target.parse().unwrap())
    }

    #[test]
    fn the_host_itself_is_out_of_reach_in_every_spelling() {
        let open = config(Policy { names: true, ..Policy::default() });
        for target in [
            "127.0.0.1:80",
            "127.9.9.9:80",
            "0.0.0.0:80",
            "0.1.2.3:80",
            "169.254.169.254:80",
            "224.0.0.1:80",
            "255.255.255.255:80",
            "10.0.2.2:80",
            "10.0.2.3:80",
            "10.0.2.77:80",
            "[::]:80",
            "[::1]:80",
            "[::127.0.0.1]:80",
            "[::ffff:127.0.0.1]:80",
            "[64:ff9b::7f00:1]:80",
            "[2002:7f00:1::]:80",
            "[fe80::1]:80",
            "[ff02::1]:80",
            "[fd72:7a65:726f:2::2]:80",
            "192.0.2.1:0",
        ] {
            assert_eq!(way(&open, target), Way::Refused, "{target}");
        }
        for target in ["192.0.2.1:80", "[2001:db8::1]:80", "8.8.8.8:53"] {
            assert_eq!(way(&open, target), Way::To(target.parse().unwrap()), "{target}");
        }
        assert_eq!(way(&open, "10.0.2.3:53"), Way::To("127.0.0.53:53".parse().unwrap()));
        let near = config(Policy { host_loopback: true, ..Policy::default() });
        assert_eq!(way(&near, "10.0.2.2:80"), Way::To("127.0.0.1:80".parse().unwrap()));
        assert_eq!(way(&near, "127.0.0.1:80"), Way::Refused);
        assert_eq!(way(&near, "10.0.2.3:53"), Way::Refused, "names were not allowed");
    }

    #[test]
    fn rules_name_networks_and_ports() {
        let rule = |network: &str, prefix, port| Rule { network: network.parse().unwrap(), prefix, port };
        let rules =
            vec![rule("192.0.2.0", 24, Some(443)), rule("198.51.100.7", 32, None), rule("2001:db8::", 32, None)];
        let strict = config(Policy { rules: Some(rules), ..Policy::default() });
        for (target, allowed) in [
            ("192.0.2.9:443", true),
            ("192.0.2.9:80", false),
            ("192.0.3.9:443", false),
            ("198.51.100.7:1", true),
            ("198.51.100.8:1", false),
            ("[2001:db8:1::1]:9", true),
            ("[2001:db9::1]:9", false),
            ("10.0.2.3:53", false),
        ] {
            assert_eq!(way(&strict, target) != Way::Refused, allowed, "{target}");
        }
        let all = config(Policy { rules: Some(vec![rule("0.0.0.0", 0, None)]), ..Policy::default() });
        assert_ne!(way(&all, "192.0.2.1:1"), Way::Refused);
        assert_eq!(way(&all, "[2001:db8::1]:1"), Way::Refused);
        assert_eq!(way(&all, "127.0.0.1:1"), Way::Refused, "no rule opens the host");
        assert!(strict.may_ping("198.51.100.7".parse().unwrap()) && !strict.may_ping("192.0.2.9".parse().unwrap()));
    }
}
