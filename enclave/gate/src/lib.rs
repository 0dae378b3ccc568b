//! Entry, threads, memory and processor of the enclave: all of its unsafe code.
