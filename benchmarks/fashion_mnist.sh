#!/bin/sh
# Fashion-MNIST for the benchmarks: nothing to do where Debian's package is installed, else its files are put into
# build/, without being root. Elsewhere: put the four files into a folder and set SPLITFX_FASHION_MNIST to it.
set -eu
place=usr/share/datasets/fashion-mnist
if [ -d "/$place" ] || [ -n "${SPLITFX_FASHION_MNIST:-}" ] || [ -d "build/$place" ]; then exit 0; fi
if ! command -v apt-get >/dev/null; then
    echo "no apt-get here: set SPLITFX_FASHION_MNIST to a folder with the four files of Fashion-MNIST" >&2
    exit 1
fi
mkdir -p build
cd build
apt-get download dataset-fashion-mnist
dpkg-deb -x dataset-fashion-mnist_*.deb .
rm dataset-fashion-mnist_*.deb
