package podnet

import (
	"errors"

	"github.com/ztun/ztun/tun"
)

// Free reports whether nobody reads the device, so that a Resume would get its
// descriptor. It is cheap enough to be asked every few seconds.
func (a *Attachment) Free() (bool, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.kernel == nil {
		return false, errors.New("podnet: attachment is closed")
	}
	err := a.kernel.inside(func() error {
		f, _, err := tun.Open(a.cfg.Device)
		if err != nil {
			return err
		}
		return f.Close()
	})
	if errors.Is(err, tun.ErrBusy) {
		return false, nil
	}
	return err == nil, err
}
