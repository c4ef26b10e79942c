//! Cables that lead out of this process, and the switch between processes that they may lead to.

use monitor::Error;
use monitor::network::server::Server;
use monitor::network::{Cable, Medium};
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyDict};

use crate::enter::{descriptor, fit, py_enter};
use crate::network::{NetworkCard, address_of_card, card_at};

/// `struct virtio_net_hdr` with its count of buffers.
const HEADER_BYTES: u8 = 12;

fn no_cable(error: std::io::Error) -> Error {
    Error::Host { what: "cable for a network card", error }
}

/// A card whose cable ends in a socket.
#[pyfunction]
#[pyo3(signature = (mac, socket, *, mtu = None), text_signature = "(mac, socket, *, mtu=1500)")]
pub fn cable_card(
    py: Python<'_>,
    mac: Vec<u8>,
    socket: &Bound<'_, PyAny>,
    mtu: Option<&Bound<'_, PyAny>>,
) -> PyResult<Py<NetworkCard>> {
    let (mac, socket) = (address_of_card(&mac)?, descriptor(socket)?);
    let mtu: u16 = mtu.map_or(Ok(1500), |mtu| fit(mtu, "an MTU"))?;
    let cable = py_enter(py, || {
        let cable = Cable::new().map_err(no_cable)?;
        cable.plug_into(Medium::socket(socket).map_err(no_cable)?).map_err(no_cable)?;
        Ok(cable)
    })?;
    card_at(py, cable, mac, mtu)
}

/// A card whose cable is a tap of the host's kernel.
#[pyfunction]
#[pyo3(signature = (mac, tap, *, mtu = None), text_signature = "(mac, tap, *, mtu=1500)")]
pub fn tap_card(
    py: Python<'_>,
    mac: Vec<u8>,
    tap: String,
    mtu: Option<&Bound<'_, PyAny>>,
) -> PyResult<Py<NetworkCard>> {
    let mac = address_of_card(&mac)?;
    let mtu: u16 = mtu.map_or(Ok(1500), |mtu| fit(mtu, "an MTU"))?;
    let cable = py_enter(py, || {
        let medium = Medium::tap(&tap, HEADER_BYTES).map_err(|error| Error::Network(no_tap(&tap, &error)))?;
        let cable = Cable::new().map_err(no_cable)?;
        cable.plug_into(medium).map_err(no_cable)?;
        Ok(cable)
    })?;
    card_at(py, cable, mac, mtu)
}

/// What to do about a tap that cannot be had.
fn no_tap(name: &str, error: &std::io::Error) -> String {
    use std::io::ErrorKind;
    match error.kind() {
        ErrorKind::InvalidInput => format!("'{name}' is no tap: give the name of one, 15 letters at most"),
        ErrorKind::PermissionDenied => format!(
            "this user may not use the tap {name}: have an administrator make it with 'ip tuntap add dev {name} mode tap \
             user NAME', and let this user open /dev/net/tun"
        ),
        ErrorKind::NotFound => "this host has no taps: there is no /dev/net/tun".into(),
        ErrorKind::ResourceBusy => format!("somebody uses the tap {name} already: choose another one"),
        _ => format!("the tap {name} cannot be used: {error}"),
    }
}

/// A switch that joins cards of several processes: a thread of this one.
#[pyclass(frozen, module = "ringzero._core")]
pub struct HostSwitch(Server);

#[pymethods]
impl HostSwitch {
    #[new]
    fn new(py: Python<'_>) -> PyResult<HostSwitch> {
        let server = py_enter(py, || Server::start().map_err(|error| Error::Host { what: "switch", error }))?;
        Ok(HostSwitch(server))
    }

    fn plug_in(&self, py: Python<'_>, mac: Vec<u8>, socket: &Bound<'_, PyAny>) -> PyResult<()> {
        let (mac, socket) = (address_of_card(&mac)?, descriptor(socket)?);
        Ok(py_enter(py, || self.0.plug_in(mac, socket).map_err(|refused| Error::Network(refused.to_string())))?)
    }

    fn report<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let report = PyDict::new(py);
        for (mac, counters) in py_enter(py, || Ok(self.0.report()))? {
            let port = PyDict::new(py);
            for (name, count) in [
                ("received_frames", counters.received_frames),
                ("received_bytes", counters.received_bytes),
                ("sent_frames", counters.sent_frames),
                ("sent_bytes", counters.sent_bytes),
                ("lost_frames", counters.lost_frames),
                ("refused_frames", counters.refused_frames),
                ("limited_frames", counters.limited_frames),
            ] {
                port.set_item(name, count)?;
            }
            report.set_item(PyBytes::new(py, &mac.0), port)?;
        }
        Ok(report)
    }
}
