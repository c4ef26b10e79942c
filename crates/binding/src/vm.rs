//! The class `Vm`.

use std::collections::BTreeMap;
use std::os::fd::IntoRawFd;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::{Duration, Instant};

use monitor::{Gpa, Options};
use pyo3::buffer::PyBuffer;
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyDict};

use crate::device::PythonDevice;
use crate::enter::{CoreError, fit, py_enter};
use crate::virtio::VirtioDevice;

/// Every machine of the process, for the exit handler.
static MACHINES: Mutex<Vec<Weak<monitor::Vm>>> = Mutex::new(Vec::new());

/// How often a wait of the main thread lets Python look for signals, so that Ctrl-C works while a guest runs. Python
/// handles signals in no other thread, so others sleep through.
const SIGNAL_CHECK: Duration = Duration::from_millis(250);

/// A virtual machine: its memory, processors, and devices. Not started until `start`.
#[pyclass(frozen, module = "ringzero._core")]
pub struct Vm {
    pub(crate) machine: Arc<monitor::Vm>,
}

/// Ends all machines of this process and waits for their threads.
#[pyfunction(name = "_stop_all")]
pub fn stop_all(py: Python<'_>) -> PyResult<()> {
    let machines: Vec<_> = {
        let list = MACHINES.lock().unwrap_or_else(PoisonError::into_inner);
        list.iter().filter_map(Weak::upgrade).collect()
    };
    Ok(py_enter(py, || {
        machines.iter().for_each(|machine| machine.shut_down());
        Ok(())
    })?)
}

fn is_main_thread(py: Python<'_>) -> PyResult<bool> {
    let threading = py.import("threading")?;
    threading
        .call_method0("current_thread")
        .map(|current| threading.call_method0("main_thread").is_ok_and(|main| main.is(&current)))
}

#[pymethods]
impl Vm {
    #[new]
    #[pyo3(
        signature = (
            memory, *, cpus = None, engine = "direct", cpu_features = Vec::new(), count_instructions = false,
            profile = false, trace_path = None, translations = None, translation_bytes = None,
            devices = Vec::new(), transport = "pci"
        ),
        text_signature = "(memory, *, cpus=1, engine='direct', cpu_features=(), count_instructions=False, \
            profile=False, trace_path=None, translations=None, translation_bytes=None, devices=(), transport='pci')"
    )]
    #[expect(clippy::too_many_arguments, reason = "they are Python's keyword arguments")]
    fn new(
        py: Python<'_>,
        memory: &Bound<'_, PyAny>,
        cpus: Option<&Bound<'_, PyAny>>,
        engine: &str,
        cpu_features: Vec<String>,
        count_instructions: bool,
        profile: bool,
        trace_path: Option<PathBuf>,
        translations: Option<PathBuf>,
        translation_bytes: Option<&Bound<'_, PyAny>>,
        devices: Vec<Bound<'_, VirtioDevice>>,
        transport: &str,
    ) -> PyResult<Self> {
        let has_pci_devices = match transport {
            "pci" => true,
            "mmio" => false,
            _ => return Err(CoreError::new_err(format!("there is no transport '{transport}': choose pci or mmio"))),
        };
        let devices = devices.iter().map(|device| device.get().take()).collect::<PyResult<_>>()?;
        let options = Options {
            memory: fit(memory, "the size of memory")?,
            processors: cpus.map_or(Ok(1), |cpus| fit(cpus, "the number of processors"))?,
            engine: engine.to_string(),
            cpu_features,
            count_instructions,
            profile,
            trace: trace_path,
            translations,
            translation_bytes: translation_bytes.map(|bytes| fit(bytes, "memory for translations")).transpose()?,
            has_pci_devices,
            devices,
        };
        let machine = Arc::new(py_enter(py, || monitor::Vm::new(&options))?);
        let mut list = MACHINES.lock().unwrap_or_else(PoisonError::into_inner);
        list.retain(|known| known.strong_count() > 0);
        list.push(Arc::downgrade(&machine));
        Ok(Vm { machine })
    }

    fn memory_map(&self) -> Vec<(u64, u64, &'static str)> {
        let rows = self.machine.memory_map();
        rows.into_iter().map(|region| (region.first.0, region.size, region.kind.name())).collect()
    }

    fn read_memory<'py>(
        &self,
        py: Python<'py>,
        address: &Bound<'py, PyAny>,
        size: &Bound<'py, PyAny>,
    ) -> PyResult<Bound<'py, PyBytes>> {
        let (address, size) = (Gpa(fit(address, "an address")?), fit(size, "a size")?);
        let bytes = py_enter(py, || self.machine.read_memory(address, size))?;
        Ok(PyBytes::new(py, &bytes))
    }

    fn write_memory(&self, py: Python<'_>, address: &Bound<'_, PyAny>, data: PyBuffer<u8>) -> PyResult<()> {
        let address = Gpa(fit(address, "an address")?);
        // Copied while the GIL is held, because another Python thread may write to the buffer.
        let bytes = data.to_vec(py)?;
        Ok(py_enter(py, || self.machine.write_memory(address, &bytes))?)
    }

    fn remap_page(&self, py: Python<'_>, address: &Bound<'_, PyAny>) -> PyResult<bool> {
        let address = Gpa(fit(address, "an address")?);
        Ok(py_enter(py, || self.machine.remap_page(address))?)
    }

    #[pyo3(signature = (cpu = None), text_signature = "($self, cpu=0)")]
    fn registers<'py>(&self, py: Python<'py>, cpu: Option<&Bound<'py, PyAny>>) -> PyResult<Bound<'py, PyDict>> {
        let cpu = cpu.map_or(Ok(0), |cpu| fit(cpu, "a processor number"))?;
        let registers = py_enter(py, || self.machine.registers(cpu))?;
        let result = PyDict::new(py);
        for (name, value) in registers {
            result.set_item(name, value)?;
        }
        Ok(result)
    }

    #[pyo3(signature = (values, cpu = None), text_signature = "($self, values, cpu=0)")]
    fn set_registers(
        &self,
        py: Python<'_>,
        values: BTreeMap<String, Bound<'_, PyAny>>,
        cpu: Option<&Bound<'_, PyAny>>,
    ) -> PyResult<()> {
        let cpu = cpu.map_or(Ok(0), |cpu| fit(cpu, "a processor number"))?;
        let mut registers = Vec::with_capacity(values.len());
        for (name, value) in values {
            let value = fit(&value, &format!("register {name}"))?;
            registers.push((name, value));
        }
        Ok(py_enter(py, || self.machine.set_registers(cpu, &registers))?)
    }

    fn add_port_device(
        &self,
        py: Python<'_>,
        first: &Bound<'_, PyAny>,
        count: &Bound<'_, PyAny>,
        device: &Bound<'_, PyAny>,
    ) -> PyResult<()> {
        let (first, count) = (fit(first, "a port")?, fit(count, "a number of ports")?);
        let device = Box::new(PythonDevice::new(device)?);
        Ok(py_enter(py, || self.machine.add_port_device(first, count, device))?)
    }

    fn add_scratch(&self, py: Python<'_>, first: &Bound<'_, PyAny>, size: &Bound<'_, PyAny>) -> PyResult<()> {
        let (first, size) = (Gpa(fit(first, "an address")?), fit(size, "a size")?);
        Ok(py_enter(py, || self.machine.add_scratch(first, size))?)
    }

    fn serial_fd(&self, py: Python<'_>, index: &Bound<'_, PyAny>) -> PyResult<i32> {
        let index = fit(index, "a serial port")?;
        let socket = py_enter(py, || self.machine.serial(index))?;
        Ok(socket.into_raw_fd())
    }

    fn start(&self, py: Python<'_>) -> PyResult<()> {
        Ok(py_enter(py, || self.machine.start())?)
    }

    fn pause(&self, py: Python<'_>) -> PyResult<()> {
        Ok(py_enter(py, || self.machine.pause())?)
    }

    fn resume(&self, py: Python<'_>) -> PyResult<()> {
        Ok(py_enter(py, || self.machine.resume())?)
    }

    fn stop(&self, py: Python<'_>) -> PyResult<()> {
        self.request_end(py, "stopped".into())
    }

    #[pyo3(signature = (timeout = None))]
    fn wait(&self, py: Python<'_>, timeout: Option<f64>) -> PyResult<Option<String>> {
        // What is no time that can pass is none: infinity waits for ever, less than nothing only looks.
        let limit = timeout.map(|seconds| {
            if seconds.is_nan() {
                return Err(CoreError::new_err("a timeout cannot be nan"));
            }
            Ok(Duration::try_from_secs_f64(seconds.max(0.0)).unwrap_or(Duration::MAX))
        });
        let limit = limit.transpose()?;
        let longest = if is_main_thread(py)? { SIGNAL_CHECK } else { Duration::MAX };
        let begin = Instant::now();
        loop {
            let left = limit.map_or(Duration::MAX, |limit| limit.saturating_sub(begin.elapsed()));
            let slice = left.min(longest);
            let reason = py_enter(py, || self.machine.wait(Some(slice)))?;
            if reason.is_some() || left == slice {
                return Ok(reason);
            }
            py.check_signals()?;
        }
    }

    fn request_end(&self, py: Python<'_>, reason: String) -> PyResult<()> {
        Ok(py_enter(py, || {
            self.machine.end(reason);
            Ok(())
        })?)
    }

    fn attach(&self, py: Python<'_>, device: &Bound<'_, VirtioDevice>) -> PyResult<()> {
        let backend = device.get().take()?;
        Ok(py_enter(py, || self.machine.attach(&backend))?)
    }

    fn detach(&self, py: Python<'_>, device: &Bound<'_, VirtioDevice>, timeout: f64) -> PyResult<bool> {
        let limit = Duration::try_from_secs_f64(timeout.max(0.0)).unwrap_or(Duration::MAX);
        let known = &device.get().known;
        let begin = Instant::now();
        let presence = py_enter(py, || self.machine.want_back(known))?;
        loop {
            // In slices: the machine may end meanwhile, and the main thread look for signals.
            let slice = limit.saturating_sub(begin.elapsed()).min(SIGNAL_CHECK);
            if py_enter(py, || self.machine.wait_gone(&presence, slice))? {
                return Ok(true);
            }
            if begin.elapsed() >= limit {
                return Ok(false);
            }
            py.check_signals()?;
        }
    }

    fn balloon_target(&self, py: Python<'_>, pages: &Bound<'_, PyAny>) -> PyResult<()> {
        let pages = fit(pages, "a number of pages")?;
        Ok(py_enter(py, || {
            self.machine.set_balloon_target(pages);
            Ok(())
        })?)
    }

    #[pyo3(signature = (ask = true), text_signature = "($self, ask=True)")]
    fn balloon_stats<'py>(&self, py: Python<'py>, ask: bool) -> PyResult<Bound<'py, PyDict>> {
        let stats = py_enter(py, || Ok(self.machine.balloon_stats(ask)))?;
        let result = PyDict::new(py);
        for (name, value) in stats {
            result.set_item(name, value)?;
        }
        Ok(result)
    }

    fn raise_irq(&self, py: Python<'_>, line: &Bound<'_, PyAny>, level: bool) -> PyResult<()> {
        let line = fit(line, "an interrupt line")?;
        Ok(py_enter(py, || self.machine.raise_irq(line, level))?)
    }

    fn stats<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let stats = py_enter(py, || Ok(self.machine.stats()))?;
        let result = PyDict::new(py);
        for (name, value) in stats {
            result.set_item(name, value)?;
        }
        Ok(result)
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        let shut_down = || self.machine.shut_down();
        // The GIL must be free, because a device may need it to come to its end.
        if Python::try_attach(|py| py.detach(shut_down)).is_none() {
            self.machine.shut_down();
        }
    }
}
