//! Network cards.

use std::net::{IpAddr, SocketAddr, TcpListener, UdpSocket};
use std::sync::Arc;

use monitor::Error;
use monitor::network::nat::Nat;
use monitor::network::nat::config::{Config, Forward, Policy, Rule, Service};
use monitor::network::{Cable, Mac, Medium, Net, Wire};
use pyo3::prelude::*;
use pyo3::types::PyDict;

use crate::enter::{CoreError, descriptor, fit, py_enter};
use crate::virtio::VirtioDevice;

/// A network card, with its cable plugged in.
#[pyclass(frozen, weakref, extends = VirtioDevice, module = "ringzero._core")]
pub struct NetworkCard {
    card: Arc<Net>,
    /// Ports of the host's that lead to the guest, in the order in which they were asked for.
    ports: Vec<u16>,
    /// Where the cable leads out of this process.
    cable: Option<Arc<Cable>>,
}

/// A rule: network, length of its prefix, and a port.
type Rules = Vec<(String, u8, Option<u16>)>;
/// A port of the host's that leads to one of the guest: whether it is UDP, where it listens, and the guest's.
type Forwards = Vec<(bool, String, u16)>;

fn parse<T: std::str::FromStr>(text: &str, what: &str) -> Result<T, Error> {
    text.parse().map_err(|_| Error::Network(format!("'{text}' is no {what}")))
}

fn listen(is_udp: bool, at: &str, guest: u16) -> Result<(Forward, u16), Error> {
    let address: SocketAddr = parse(at, "address with a port")?;
    let refused = |error: std::io::Error| {
        Error::Network(match error.kind() {
            std::io::ErrorKind::AddrInUse => format!("the port {address} is taken already: choose another one"),
            std::io::ErrorKind::PermissionDenied => {
                format!("this user may not listen at {address}: choose a port from 1024 on")
            }
            _ => format!("nobody can listen at {address}: {error}"),
        })
    };
    let (forward, bound) = if is_udp {
        let socket = UdpSocket::bind(address).map_err(refused)?;
        let bound = socket.local_addr();
        (Forward::Udp(socket, guest), bound)
    } else {
        let listener = TcpListener::bind(address).map_err(refused)?;
        let bound = listener.local_addr();
        (Forward::Tcp(listener, guest), bound)
    };
    Ok((forward, bound.map_err(refused)?.port()))
}

fn new_card(wire: Arc<dyn Wire>, mac: Mac, mtu: u16, ports: Vec<u16>) -> PyClassInitializer<NetworkCard> {
    let card = Arc::new(Net::new(wire, mac, mtu));
    PyClassInitializer::from(VirtioDevice::new(card.clone())).add_subclass(NetworkCard { card, ports, cable: None })
}

/// A card whose cable leads out of this process.
pub fn card_at(py: Python<'_>, cable: Cable, mac: Mac, mtu: u16) -> PyResult<Py<NetworkCard>> {
    let cable = Arc::new(cable);
    let card = Arc::new(Net::new(cable.clone(), mac, mtu));
    let device = PyClassInitializer::from(VirtioDevice::new(card.clone()));
    Py::new(py, device.add_subclass(NetworkCard { card, ports: Vec::new(), cable: Some(cable) }))
}

pub fn address_of_card(mac: &[u8]) -> PyResult<Mac> {
    let mac = mac.try_into().map(Mac).ok().filter(|mac| !mac.is_group());
    mac.ok_or_else(|| CoreError::new_err("a card's address has 6 bytes, and names one card"))
}

#[pymethods]
impl NetworkCard {
    fn set_link(&self, py: Python<'_>, is_up: bool) -> PyResult<()> {
        Ok(py_enter(py, || {
            self.card.set_link(is_up);
            Ok(())
        })?)
    }

    fn plug_into(&self, py: Python<'_>, socket: &Bound<'_, PyAny>) -> PyResult<()> {
        let socket = descriptor(socket)?;
        Ok(py_enter(py, || {
            let cable =
                self.cable.as_ref().ok_or_else(|| Error::Network("this card has no cable to plug in".into()))?;
            let plugged = Medium::socket(socket).and_then(|medium| cable.plug_into(medium));
            plugged.map_err(|error| Error::Network(format!("a cable cannot be plugged in: {error}")))
        })?)
    }

    fn ports(&self) -> Vec<u16> {
        self.ports.clone()
    }

    fn counters<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let counters = PyDict::new(py);
        for (name, value) in self.card.counters() {
            counters.set_item(name, value)?;
        }
        if let Some(cable) = &self.cable {
            counters.set_item("unsent_frames", cable.lost())?;
        }
        Ok(counters)
    }
}

/// A card on a network of its own, with a way out.
#[pyfunction]
#[pyo3(
    signature = (mac, *, mtu = None, name = String::new(), resolvers = Vec::new(), rules = None, names = true,
        host_loopback = false, ipv6 = false, forwards = Vec::new(), services = Vec::new()),
    text_signature = "(mac, *, mtu=1500, name='', resolvers=(), rules=None, names=True, host_loopback=False, \
        ipv6=False, forwards=(), services=())"
)]
#[expect(clippy::too_many_arguments, reason = "they are Python's keyword arguments")]
pub fn nat_card(
    py: Python<'_>,
    mac: Vec<u8>,
    mtu: Option<&Bound<'_, PyAny>>,
    name: String,
    resolvers: Vec<String>,
    rules: Option<Rules>,
    names: bool,
    host_loopback: bool,
    ipv6: bool,
    forwards: Forwards,
    services: Vec<(String, Bound<'_, PyAny>)>,
) -> PyResult<Py<NetworkCard>> {
    let mac = address_of_card(&mac)?;
    let mtu: u16 = mtu.map_or(Ok(1500), |mtu| fit(mtu, "an MTU"))?;
    if mtu < 1280 {
        return Err(CoreError::new_err(format!("an MTU of {mtu} bytes is too small: give 1280 to 65520")));
    }
    let services = services.into_iter().map(|(address, fd)| Ok((address, descriptor(&fd)?)));
    let services = services.collect::<PyResult<Vec<_>>>()?;
    let (nat, ports) = py_enter(py, || {
        let resolvers = resolvers.iter().map(|text| parse::<SocketAddr>(text, "address with a port"));
        let rules = rules.map(|rules| {
            rules
                .into_iter()
                .map(|(network, prefix, port)| {
                    Ok(Rule { network: parse::<IpAddr>(&network, "address")?, prefix, port })
                })
                .collect::<Result<Vec<_>, Error>>()
        });
        let services = services
            .into_iter()
            .map(|(address, socket)| Ok(Service { address: parse(&address, "address with a port")?, socket }));
        let listening = forwards.iter().map(|(is_udp, at, guest)| listen(*is_udp, at, *guest));
        let (forwards, ports) = listening.collect::<Result<Vec<_>, Error>>()?.into_iter().unzip();
        let config = Config {
            policy: Policy { rules: rules.transpose()?, names, host_loopback },
            resolvers: resolvers.collect::<Result<_, _>>()?,
            has_ipv6: ipv6,
            mtu,
            name,
            forwards,
            services: services.collect::<Result<_, Error>>()?,
        };
        let nat = Nat::new(config, mac).map_err(|error| Error::Host { what: "network for a guest", error })?;
        Ok((nat, ports))
    })?;
    Py::new(py, new_card(Arc::new(nat), mac, mtu, ports))
}

/// Joins cards of machines of this process.
#[pyclass(frozen, weakref, module = "ringzero._core")]
pub struct Switch(Arc<monitor::network::Switch>);

#[pymethods]
impl Switch {
    #[new]
    fn new() -> Switch {
        Switch(Arc::default())
    }

    #[pyo3(signature = (mac, *, mtu = None), text_signature = "($self, mac, *, mtu=1500)")]
    fn card(&self, py: Python<'_>, mac: Vec<u8>, mtu: Option<&Bound<'_, PyAny>>) -> PyResult<Py<NetworkCard>> {
        let mac = address_of_card(&mac)?;
        let mtu: u16 = mtu.map_or(Ok(1500), |mtu| fit(mtu, "an MTU"))?;
        let port = py_enter(py, || self.0.plug_in(mac).map_err(|taken| Error::Network(taken.to_string())))?;
        Py::new(py, new_card(Arc::new(port), mac, mtu, Vec::new()))
    }
}
