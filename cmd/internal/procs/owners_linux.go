package procs

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"sync"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"github.com/ztun/ztun/cmd/internal/owner"
	"github.com/ztun/ztun/tun/podnet"
)

// Owner says who owns a TCP socket of the host, in the words of the proxy's
// question.
type Owner = owner.Owner

// What an Owner can be.
const (
	OwnerNone    = owner.None
	OwnerLocal   = owner.Local
	OwnerKubelet = owner.Kubelet
	OwnerUnknown = owner.Unknown
)

// TCP states (net/tcp_states.h).
const (
	tcpEstablished = 1
	tcpSynSent     = 2
)

const (
	// sockIDLen is the length of struct inet_diag_sockid, and inodeAt where
	// idiag_inode stands in struct inet_diag_msg (linux/inet_diag.h).
	sockIDAt   = 4
	sockIDLen  = 48
	inodeAt    = sockIDAt + sockIDLen + 16
	diagMsgLen = inodeAt + 4
)

// Owners answers whether a process of the host's network namespace owns a TCP
// socket.
type Owners struct {
	kubelets *kubelets

	// mu guards the socket: one question at a time.
	mu      sync.Mutex
	sockets map[int]*nl.SocketHandle
}

// NewOwners asks the kernel about one namespace, which stays the caller's; nil
// is our own. proc shows the host's processes, as in a Finder.
func NewOwners(hostNetns *os.File, proc string) (*Owners, error) {
	var host nsID
	var err error
	if hostNetns == nil {
		host, err = identifyPath(unix.AT_FDCWD, "/proc/self/ns/net")
	} else {
		host, err = identify(hostNetns)
	}
	if err != nil {
		return nil, fmt.Errorf("procs: the host's namespace: %w", err)
	}
	o := &Owners{kubelets: newKubelets(proc, host)}
	open := func() error {
		s, err := nl.Subscribe(unix.NETLINK_INET_DIAG)
		if err != nil {
			return err
		}
		o.sockets = map[int]*nl.SocketHandle{unix.NETLINK_INET_DIAG: {Socket: s}}
		tv := unix.NsecToTimeval(netlinkTimeout.Nanoseconds())
		return errors.Join(s.SetReceiveTimeout(&tv), s.SetSendTimeout(&tv))
	}
	if hostNetns == nil {
		err = open()
	} else {
		err = podnet.Inside(hostNetns, open)
	}
	if err == nil {
		// A kernel without TCP diagnosis says ENOENT, as if there were no
		// socket. A list of no state is empty where it is there.
		for _, family := range []uint8{unix.AF_INET, unix.AF_INET6} {
			r := diagRequest{family: family}
			if e := o.request(&r, unix.NLM_F_DUMP, nil); e != nil && (family == unix.AF_INET || !errors.Is(e, unix.ENOENT)) {
				err = e
			}
		}
	}
	if err != nil {
		o.Close()
		return nil, fmt.Errorf("procs: socket diagnosis in the host's namespace: %w", err)
	}
	return o, nil
}

// Close gives back what is open. Nothing may be asked after it.
func (o *Owners) Close() {
	o.mu.Lock()
	defer o.mu.Unlock()
	for _, s := range o.sockets {
		s.Close()
	}
	o.sockets = nil
}

// Of says who owns the socket of a connection that the host opened or has open: local
// is the host's end. After an error it is OwnerNone.
func (o *Owners) Of(local, remote netip.AddrPort) (Owner, error) {
	inode, err := o.find(local, remote)
	if err != nil {
		return OwnerNone, fmt.Errorf("procs: socket %v to %v: %w", local, remote, err)
	}
	if inode == 0 {
		return OwnerNone, nil
	}
	return o.kubelets.own(inode), nil
}

// find returns the inode of a socket, 0 if there is none that a process owns.
func (o *Owners) find(local, remote netip.AddrPort) (inode uint32, err error) {
	local, remote = unmap(local), unmap(remote)
	if local.Addr().Is4() != remote.Addr().Is4() || !local.Addr().IsValid() {
		return 0, errors.New("not addresses of one family")
	}
	r := exactly(local, remote)
	err = o.request(&r, 0, func(m []byte) error {
		s, err := parseDiag(m)
		// Without such a connection the kernel answers with a listener.
		if err == nil && s.local == local && s.remote == remote && (s.state == tcpEstablished || s.state == tcpSynSent) {
			inode = s.inode
		}
		return err
	})
	if errors.Is(err, unix.ENOENT) {
		return 0, nil
	}
	return inode, err
}

func unmap(a netip.AddrPort) netip.AddrPort {
	return netip.AddrPortFrom(a.Addr().Unmap().WithZone(""), a.Port())
}

func (o *Owners) request(r *diagRequest, flags int, each func([]byte) error) error {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.sockets == nil {
		return os.ErrClosed
	}
	req := nl.NewNetlinkRequest(nl.SOCK_DIAG_BY_FAMILY, flags)
	req.Sockets = o.sockets
	req.AddData(r)
	var eachErr error
	err := req.ExecuteIter(unix.NETLINK_INET_DIAG, 0, func(m []byte) bool {
		if each != nil && eachErr == nil {
			eachErr = each(m)
		}
		return true
	})
	return errors.Join(err, eachErr)
}

// diagRequest is struct inet_diag_req_v2.
type diagRequest struct {
	family uint8
	states uint32
	id     [sockIDLen]byte
}

func (r *diagRequest) Len() int { return 8 + sockIDLen }

func (r *diagRequest) Serialize() []byte {
	b := []byte{r.family, unix.IPPROTO_TCP, 0, 0}
	b = binary.NativeEndian.AppendUint32(b, r.states)
	return append(b, r.id[:]...)
}

// exactly asks for one socket, of any interface.
func exactly(local, remote netip.AddrPort) diagRequest {
	r := diagRequest{family: unix.AF_INET, states: 1<<tcpEstablished | 1<<tcpSynSent}
	if local.Addr().Is6() {
		r.family = unix.AF_INET6
	}
	binary.BigEndian.PutUint16(r.id[0:], local.Port())
	binary.BigEndian.PutUint16(r.id[2:], remote.Port())
	copy(r.id[4:20], local.Addr().AsSlice())
	copy(r.id[20:36], remote.Addr().AsSlice())
	for i := 40; i < sockIDLen; i++ {
		r.id[i] = 0xff // INET_DIAG_NOCOOKIE
	}
	return r
}

// diag is a socket as the kernel describes it.
type diag struct {
	state         uint8
	local, remote netip.AddrPort
	inode         uint32
}

var errDiag = errors.New("procs: socket diagnosis is not as linux/inet_diag.h says")

// parseDiag reads struct inet_diag_msg.
func parseDiag(m []byte) (diag, error) {
	if len(m) < diagMsgLen {
		return diag{}, errDiag
	}
	id := m[sockIDAt : sockIDAt+sockIDLen]
	addr := func(b []byte) netip.Addr {
		if m[0] == unix.AF_INET {
			return netip.AddrFrom4([4]byte(b))
		}
		return netip.AddrFrom16([16]byte(b)).Unmap()
	}
	if m[0] != unix.AF_INET && m[0] != unix.AF_INET6 {
		return diag{}, errDiag
	}
	return diag{
		state:  m[1],
		local:  netip.AddrPortFrom(addr(id[4:20]), binary.BigEndian.Uint16(id[0:])),
		remote: netip.AddrPortFrom(addr(id[20:36]), binary.BigEndian.Uint16(id[2:])),
		inode:  binary.NativeEndian.Uint32(m[inodeAt:]),
	}, nil
}
