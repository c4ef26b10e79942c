use std::path::PathBuf;

/// What the operator must know: one sentence a message. What a guest did is never one of these.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error(transparent)]
    Memory(#[from] memory::Error),
    #[error("machines of {wanted} processors are not supported: give a number from 1 to {most}")]
    Processors { wanted: usize, most: usize },
    #[error("there is no engine '{name}' here: choose one of {}", .known.join(", "))]
    Engine { name: String, known: Vec<&'static str> },
    #[error("processors have no '{name}' on request: choose from {}", .known.join(", "))]
    Feature { name: String, known: Vec<&'static str> },
    #[error("the engine '{engine}' cannot run here: {reason}")]
    EngineRefused { engine: &'static str, reason: String },
    #[error("there is no processor {wanted}: this machine has {count}, counted from 0")]
    NoProcessor { wanted: usize, count: usize },
    #[error("the processors are running: pause the machine first")]
    Running,
    #[error("the machine was started already")]
    Started,
    #[error("the machine is not started")]
    NotStarted,
    #[error("an image is mapped from a file in memory that is sealed against writing and shrinking")]
    NotSealed,
    #[error("the machine has a swap store already: it is set once")]
    SwapThere,
    #[error("the machine is in no sharing group: its pool must come along")]
    NoPool,
    #[error("the machine is in another sharing group already")]
    OtherPool,
    #[error("no pages can be shared: {0}")]
    Sharing(std::io::Error),
    #[error("the machine has ended: {0}")]
    Ended(String),
    #[error("{0} cannot be called from a device of the same machine: its processor waits for the device")]
    FromDevice(&'static str),
    #[error("there is no register '{0}'")]
    NoRegister(String),
    #[error("{value:#x} does not fit into register {name}")]
    RegisterValue { name: String, value: u64 },
    #[error("interrupt lines are 0 to 15, not {0}")]
    Line(usize),
    #[error("this machine does not have that device, or the guest has let it go already")]
    NoDevice,
    #[error(transparent)]
    Platform(#[from] io::platform::Error),
    #[error("the trace file {} cannot be written: {error}", .path.display())]
    Trace { path: PathBuf, error: std::io::Error },
    #[error("the disk {} cannot be used: {error}", .path.display())]
    Disk { path: PathBuf, error: std::io::Error },
    #[error(transparent)]
    Console(#[from] io::virtio::console::ConsoleError),
    #[error(transparent)]
    Fs(#[from] io::virtio::fs::FsError),
    #[error(transparent)]
    Vsock(#[from] io::virtio::vsock::VsockError),
    #[error("{0}")]
    Network(String),
    #[error("the host gave no {what}: {error}")]
    Host { what: &'static str, error: std::io::Error },
}
