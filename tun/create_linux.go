package tun

import (
	"errors"
	"os"
)

// ErrBusy says that somebody reads the device.
var ErrBusy = errors.New("tun: device has a reader")

// Create makes a persistent TUN device in the network namespace of the calling thread, down, and returns its packet
// descriptor in blocking mode.
func Create(name string, mtu uint32) (f *os.File, offload bool, err error) {
	return nil, false, errors.ErrUnsupported
}

// Open opens a device that Create made, in the network namespace of the calling thread. The error matches ErrBusy
// if somebody reads it and os.ErrNotExist if there is none.
func Open(name string) (f *os.File, offload bool, err error) {
	return nil, false, errors.ErrUnsupported
}

// Remove takes the device away, also under its reader. No device is no error.
func Remove(name string) error { return errors.ErrUnsupported }
