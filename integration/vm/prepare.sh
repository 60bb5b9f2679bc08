# What both guests need once their file systems are mounted.
# shellcheck shell=bash

prepare() {
    modprobe -aq veth br_netfilter nf_tables nft_compat loop tun || true
    mkdir -p /scratch
    mount -o noatime /dev/vda /scratch && mkdir -pm 1777 /scratch/tmp
    swapon /dev/vdb
}
