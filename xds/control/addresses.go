package control

import (
	"encoding/json"
	"fmt"
	"net/netip"

	"github.com/cespare/xxhash/v2"
)

// addressBook gives Services without a clusterIP their addresses. An address
// follows from the Service's name, so that a restart and a second reader of the
// same directory find the same one; where two names meet, the one that had the
// address before keeps it. Not safe for concurrent use.
type addressBook struct {
	held   map[string]netip.Addr // by range and namespace/name
	holder map[netip.Addr]string // held, the other way round
	used   map[string]netip.Addr // of held, what the present reading asked for
}

func newAddressBook(held map[string]netip.Addr) *addressBook {
	b := &addressBook{held: make(map[string]netip.Addr), holder: make(map[netip.Addr]string), used: make(map[string]netip.Addr)}
	for key, addr := range sorted(held) {
		b.hold(key, addr)
	}
	return b
}

func (b *addressBook) hold(key string, addr netip.Addr) {
	if _, ok := b.holder[addr]; !ok {
		b.held[key], b.holder[addr] = addr, key
	}
}

// reading starts a reading of the directory, and next is the book to keep if
// the reading is used: what it did not ask for is free again.
func (b *addressBook) reading() *addressBook { return newAddressBook(b.held) }

func (b *addressBook) next() *addressBook { return newAddressBook(b.used) }

// take gives name its address in r, unless every one it could have is taken.
func (b *addressBook) take(r netip.Prefix, name string, taken func(netip.Addr) bool) (netip.Addr, bool) {
	key := r.String() + " " + name
	if addr, ok := b.held[key]; ok && r.Contains(addr) && !taken(addr) {
		b.used[key] = addr
		return addr, true
	}
	hostBits := min(r.Addr().BitLen()-r.Bits(), 32)
	size := uint64(1) << hostBits
	h := xxhash.Sum64String(name)
	for i := range min(size, 1<<20) {
		n := (h + i) % size
		if n == 0 || n == size-1 { // the network's own and the broadcast address
			continue
		}
		addr := offset(r.Masked().Addr(), n)
		if holder, ok := b.holder[addr]; taken(addr) || (ok && holder != key) {
			continue
		}
		b.hold(key, addr)
		b.used[key] = addr
		return addr, true
	}
	return netip.Addr{}, false
}

// offset adds n, below 2^32, to an address that ends in enough zero bits.
func offset(base netip.Addr, n uint64) netip.Addr {
	raw := base.AsSlice()
	for i := len(raw) - 1; n > 0 && i >= 0; i-- {
		raw[i] |= byte(n)
		n >>= 8
	}
	addr, _ := netip.AddrFromSlice(raw)
	return addr
}

// MarshalJSON and UnmarshalJSON keep the book in the state directory.
func (b *addressBook) MarshalJSON() ([]byte, error) { return json.Marshal(b.held) }

func (b *addressBook) UnmarshalJSON(data []byte) error {
	held := make(map[string]netip.Addr)
	if err := json.Unmarshal(data, &held); err != nil {
		return err
	}
	*b = *newAddressBook(held)
	return nil
}

// validate checks what withDefaults leaves unchecked.
func (m Mesh) validate() []error {
	var errs []error
	var v4, v6 bool
	for _, r := range m.ServiceRanges {
		switch {
		case !r.IsValid() || r.Masked() != r:
			errs = append(errs, fmt.Errorf("control: service range %v is no network", r))
		case r.Addr().BitLen()-r.Bits() < 3:
			errs = append(errs, fmt.Errorf("control: service range %v is too small", r))
		case r.Addr().Is4() && v4, r.Addr().Is6() && v6:
			errs = append(errs, fmt.Errorf("control: service range %v is the second one of its family", r))
		}
		v4, v6 = v4 || r.Addr().Is4(), v6 || r.Addr().Is6()
	}
	for what, s := range sorted(map[string]string{
		"trust domain": m.TrustDomain, "cluster domain": m.ClusterDomain, "cluster id": m.ClusterID,
		"root namespace": m.RootNamespace, "network": m.Network,
	}) {
		if len(s) > 253 || !isName(s) {
			errs = append(errs, fmt.Errorf("control: %s %q is not made of letters, digits, dots, dashes and underscores", what, s))
		}
	}
	return errs
}

func isName(s string) bool {
	for _, c := range []byte(s) {
		ok := c == '-' || c == '.' || c == '_' || (c >= '0' && c <= '9') || (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z')
		if !ok {
			return false
		}
	}
	return true
}
