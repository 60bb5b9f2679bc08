# What both guests need once their file systems are mounted.
# shellcheck shell=bash

prepare() {
    modprobe -aq veth br_netfilter nf_tables nft_compat loop tun || true
    mkdir -p /scratch
    mount -o noatime /dev/vda /scratch && mkdir -pm 1777 /scratch/tmp
    # An overlay's upper directory can't be on the root, which is an overlay itself.
    mkdir -p /scratch/slipway /var/lib/slipway && mount --bind /scratch/slipway /var/lib/slipway
    swapon /dev/vdb
}
