use x86::Gpa;

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("the host gave no memory for the guest's pages: {0}")]
    Host(#[from] std::io::Error),
    #[error("guest memory of {0} bytes is not a whole number of 4 KiB pages from 1 MiB to 512 GiB")]
    Size(u64),
    #[error("there is no guest RAM for {size} bytes at {address}")]
    NotRam { address: Gpa, size: u64 },
    #[error("source {0} of the machine's pages is taken, or there is no such")]
    Source(usize),
    #[error("the page at {0} was written to already: an image is mapped before anything is loaded there")]
    Touched(Gpa),
    #[error("the pool has no machine page left")]
    PoolEmpty,
}
