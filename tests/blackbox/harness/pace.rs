//! How long things may take here. Every limit of a test is made by [`seconds`], so that a machine that is
//! slow (one that QEMU emulates, see `hack/vm`) needs to be told of in one place only.

use std::sync::LazyLock;
use std::time::Duration;

/// In the environment: how many times slower than an ordinary machine this one may be.
const SLOWNESS: &str = "SLIPWAY_TEST_SLOWNESS";

static FACTOR: LazyLock<u32> = LazyLock::new(|| match std::env::var(SLOWNESS) {
    Err(_) => 1,
    Ok(text) => match text.parse() {
        Ok(factor) if factor > 0 => factor,
        _ => panic!("{SLOWNESS} is {text:?}; it has to be a whole number, such as 15"),
    },
});

/// What may take so many seconds on an ordinary machine may take so long here.
pub fn seconds(ordinary: u64) -> Duration {
    Duration::from_secs(ordinary) * *FACTOR
}
