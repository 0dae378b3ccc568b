//! Stands in for RustCrypto's `cpufeatures` 0.3: the answer is what the build was told, never CPUID, which an
//! enclave cannot execute and a host could forge.
#![no_std]
#![forbid(unsafe_code)]

/// Makes module `$name`, whose `get()` says whether every named target feature is enabled in this build.
#[macro_export]
macro_rules! new {
    ($name:ident, $($feature:tt),+ $(,)?) => {
        mod $name {
            /// Proof of a detection that needs none.
            #[derive(Copy, Clone, Debug)]
            pub struct InitToken(());
            impl InitToken {
                /// The token.
                pub fn init() -> Self { Self(()) }
                /// The token and the answer.
                pub fn init_get() -> (Self, bool) { (Self(()), get()) }
                /// The answer.
                #[inline(always)]
                pub fn get(&self) -> bool { get() }
            }
            /// The token.
            pub fn init() -> InitToken { InitToken(()) }
            /// The token and the answer.
            pub fn init_get() -> (InitToken, bool) { InitToken::init_get() }
            /// The answer.
            #[inline(always)]
            pub fn get() -> bool { cfg!(all($(target_feature = $feature),+)) }
        }
    };
}
