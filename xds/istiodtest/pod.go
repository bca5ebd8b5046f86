// Package istiodtest has what a proxy's pod finds around it in Kubernetes: a
// nameserver, and mounted volumes whose files are replaced under it.
package istiodtest

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"golang.org/x/net/dns/dnsmessage"
)

// A Nameserver answers A queries of one name, over UDP.
type Nameserver struct {
	Queries atomic.Int32 // that were answered with an address

	name string
	conn net.PacketConn
	done chan struct{}

	// mu guards the fields below.
	mu      sync.Mutex
	address [4]byte // zero: there is no such name
}

// nameserver is where the process' resolver asks instead of the machine's own;
// nil: there.
var nameserver atomic.Pointer[string]

// The resolver is replaced once: lookups that a test leaves behind read the
// variable later.
func init() {
	net.DefaultResolver = &net.Resolver{PreferGo: true, Dial: func(ctx context.Context, network, address string) (net.Conn, error) {
		if to := nameserver.Load(); to != nil {
			network, address = "udp", *to
		}
		return new(net.Dialer).DialContext(ctx, network, address)
	}}
}

// UseNameserver makes this process resolve by a Nameserver for name, until the
// test ends. So far there is no such name.
func UseNameserver(t *testing.T, name string) *Nameserver {
	t.Helper()
	conn, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	n := &Nameserver{name: name, conn: conn, done: make(chan struct{})}
	go n.serve()
	address := conn.LocalAddr().String()
	nameserver.Store(&address)
	t.Cleanup(func() {
		nameserver.Store(nil)
		_ = conn.Close()
		<-n.done
	})
	return n
}

// Set makes the name that of address, for an hour if one believes the answer.
func (n *Nameserver) Set(address [4]byte) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.address = address
}

func (n *Nameserver) serve() {
	defer close(n.done)
	buf := make([]byte, 1500)
	for {
		size, from, err := n.conn.ReadFrom(buf)
		if err != nil {
			return
		}
		var m dnsmessage.Message
		if m.Unpack(buf[:size]) != nil || len(m.Questions) != 1 {
			continue
		}
		n.answer(&m)
		if out, err := m.Pack(); err == nil {
			_, _ = n.conn.WriteTo(out, from)
		}
	}
}

func (n *Nameserver) answer(m *dnsmessage.Message) {
	n.mu.Lock()
	address := n.address
	n.mu.Unlock()
	q := m.Questions[0]
	m.Response, m.Authoritative, m.Additionals = true, true, nil
	switch {
	case address == [4]byte{} || !strings.HasPrefix(q.Name.String(), n.name+"."):
		m.RCode = dnsmessage.RCodeNameError
	case q.Type == dnsmessage.TypeA:
		n.Queries.Add(1)
		m.Answers = []dnsmessage.Resource{{
			Header: dnsmessage.ResourceHeader{Name: q.Name, Type: q.Type, Class: q.Class, TTL: 3600},
			Body:   &dnsmessage.AResource{A: address},
		}}
	}
}

// A Volume is a mounted ConfigMap, or a projected one. Its files are links into
// a directory that is a link itself, which the kubelet replaces.
// https://pkg.go.dev/k8s.io/kubernetes/pkg/volume/util#AtomicWriter
type Volume struct {
	t       *testing.T
	dir     string
	version int
}

// NewVolume mounts a volume that may have files of these names, and has none.
func NewVolume(t *testing.T, names ...string) *Volume {
	t.Helper()
	v := &Volume{t: t, dir: t.TempDir()}
	for _, name := range names {
		if err := os.Symlink(filepath.Join("..data", name), v.Path(name)); err != nil {
			t.Fatal(err)
		}
	}
	return v
}

// Path is where the file of that name is.
func (v *Volume) Path(name string) string { return filepath.Join(v.dir, name) }

// Swap replaces all files at once.
func (v *Volume) Swap(files map[string]string) {
	v.t.Helper()
	old := filepath.Join(v.dir, fmt.Sprintf("..%d", v.version))
	v.version++
	version := fmt.Sprintf("..%d", v.version)
	err := os.Mkdir(filepath.Join(v.dir, version), 0o700)
	for name, text := range files {
		err = errors.Join(err, os.WriteFile(filepath.Join(v.dir, version, name), []byte(text), 0o600))
	}
	err = errors.Join(err, os.Symlink(version, v.Path("..data_tmp")), os.Rename(v.Path("..data_tmp"), v.Path("..data")), os.RemoveAll(old))
	if err != nil {
		v.t.Fatal(err)
	}
}
