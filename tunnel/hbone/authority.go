package hbone

import (
	"fmt"
	"net/netip"
	"strconv"
	"strings"
)

// maxHost bounds a host name, "host names MUST be 255 octets or less" of
// https://www.rfc-editor.org/rfc/rfc1123#section-2.1
const maxHost = 255

// An Authority is the target of a CONNECT: an address or a host name, and a
// port that is never 0.
type Authority struct {
	Addr netip.Addr // valid if the host is an address; never IPv4 in IPv6, no zone
	Host string     // else the host name, as sent
	Port uint16
}

// ParseAuthority parses ip:port, [ip6]:port and host:port.
func ParseAuthority(s string) (Authority, error) {
	if len(s) > maxHost+len(":65535") {
		return Authority{}, fmt.Errorf("hbone: authority of %d bytes", len(s))
	}
	at := strings.LastIndexByte(s, ':')
	if at < 0 {
		return Authority{}, fmt.Errorf("hbone: authority %q has no port", s)
	}
	host := s[:at]
	port, err := strconv.ParseUint(s[at+1:], 10, 16)
	if err != nil || port == 0 || s[at+1] == '+' {
		return Authority{}, fmt.Errorf("hbone: authority %q has no valid port", s)
	}
	a := Authority{Port: uint16(port)}
	if inner, ok := strings.CutPrefix(host, "["); ok {
		inner, ok = strings.CutSuffix(inner, "]")
		addr, err := netip.ParseAddr(inner)
		if !ok || err != nil || !addr.Is6() || addr.Zone() != "" {
			return Authority{}, fmt.Errorf("hbone: authority %q has no valid IPv6 address", s)
		}
		a.Addr = addr.Unmap()
		return a, nil
	}
	if addr, err := netip.ParseAddr(host); err == nil && addr.Is4() {
		a.Addr = addr
		return a, nil
	}
	if !isHost(host) {
		return Authority{}, fmt.Errorf("hbone: authority %q has no valid host", s)
	}
	a.Host = host
	return a, nil
}

// AddrPort returns the target as an address, if it is one.
func (a Authority) AddrPort() (ap netip.AddrPort, ok bool) {
	return netip.AddrPortFrom(a.Addr, a.Port), a.Addr.IsValid()
}

// String returns the form that ParseAuthority reads.
func (a Authority) String() string {
	if a.Addr.IsValid() {
		return netip.AddrPortFrom(a.Addr, a.Port).String()
	}
	return a.Host + ":" + strconv.Itoa(int(a.Port))
}

// isHost reports whether s may name a service: the letters of DNS names, and
// the underscore and asterisk that Kubernetes and Istio use in theirs.
func isHost(s string) bool {
	if s == "" || len(s) > maxHost {
		return false
	}
	for i := range len(s) {
		switch c := s[i]; {
		case 'a' <= c && c <= 'z', 'A' <= c && c <= 'Z', '0' <= c && c <= '9', c == '-', c == '.', c == '_', c == '*':
		default:
			return false
		}
	}
	return true
}
