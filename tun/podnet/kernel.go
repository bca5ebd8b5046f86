package podnet

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"strings"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// requestTimeout bounds one netlink request where ctx does not.
const requestTimeout = 5 * time.Second

// dumpTries is how often a dump is repeated that changed while it ran.
const dumpTries = 8

// kernel is what we talk to about one namespace. Not for concurrent use.
type kernel struct {
	ns      *os.File
	links   *netlink.Handle
	sockets map[int]*nl.SocketHandle
	boot    string
	cookie  uint64
	hasIPv6 bool
	// denyDestroy is set by tests, whose kernel then is one without CONFIG_INET_DIAG_DESTROY.
	denyDestroy func() error
}

// openKernel duplicates ns, which stays the caller's.
func openKernel(ns *os.File) (*kernel, error) {
	k := &kernel{sockets: map[int]*nl.SocketHandle{}}
	var err error
	if k.ns, err = duplicate(ns); err != nil {
		return nil, fmt.Errorf("podnet: namespace: %w", err)
	}
	err = k.inside(func() error {
		if k.links, err = netlink.NewHandle(unix.NETLINK_ROUTE); err != nil {
			return err
		}
		for _, proto := range []int{unix.NETLINK_ROUTE, unix.NETLINK_INET_DIAG} {
			s, err := nl.Subscribe(proto)
			if err != nil {
				return err
			}
			k.sockets[proto] = &nl.SocketHandle{Socket: s}
		}
		k.cookie = netnsCookie()
		_, err := os.Stat("/proc/sys/net/ipv6/conf/all")
		k.hasIPv6 = err == nil
		return nil
	})
	if err != nil {
		k.close()
		return nil, fmt.Errorf("podnet: open namespace: %w", err)
	}
	b, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err == nil {
		k.boot = strings.TrimSpace(string(b))
	}
	return k, nil
}

func (k *kernel) close() {
	if k.links != nil {
		k.links.Close()
	}
	for _, s := range k.sockets {
		s.Close()
	}
	_ = k.ns.Close()
}

func (k *kernel) families() []uint8 {
	if k.hasIPv6 {
		return []uint8{unix.AF_INET, unix.AF_INET6}
	}
	return []uint8{unix.AF_INET}
}

// netnsCookie is unique among the namespaces since boot; 0 on kernels before 5.14.
func netnsCookie() uint64 {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return 0
	}
	defer func() { _ = unix.Close(fd) }()
	cookie, err := unix.GetsockoptUint64(fd, unix.SOL_SOCKET, soNetnsCookie)
	if err != nil {
		return 0
	}
	return cookie
}

func duplicate(f *os.File) (*os.File, error) {
	rc, err := f.SyscallConn()
	if err != nil {
		return nil, err
	}
	dup, dupErr := -1, error(nil)
	if err := rc.Control(func(fd uintptr) { dup, dupErr = unix.FcntlInt(fd, unix.F_DUPFD_CLOEXEC, 0) }); err != nil {
		return nil, err
	}
	if dupErr != nil {
		return nil, dupErr
	}
	return os.NewFile(uintptr(dup), f.Name()), nil
}

// inside runs f on a thread in the namespace.
func (k *kernel) inside(f func() error) error { return Inside(k.ns, f) }

// request runs one netlink request. each may be nil.
func (k *kernel) request(ctx context.Context, proto, msgType, flags int, fill func(*nl.NetlinkRequest), each func(m []byte) error) error {
	if err := ctx.Err(); err != nil {
		return context.Cause(ctx)
	}
	timeout := requestTimeout
	if deadline, ok := ctx.Deadline(); ok {
		timeout = max(time.Millisecond, min(timeout, time.Until(deadline)))
	}
	tv := unix.NsecToTimeval(timeout.Nanoseconds())
	s := k.sockets[proto]
	if err := errors.Join(s.Socket.SetReceiveTimeout(&tv), s.Socket.SetSendTimeout(&tv)); err != nil {
		return err
	}
	req := nl.NewNetlinkRequest(msgType, flags)
	req.Sockets = k.sockets
	fill(req)
	var eachErr error
	err := req.ExecuteIter(proto, 0, func(m []byte) bool {
		if each != nil && eachErr == nil {
			eachErr = each(m)
		}
		return true
	})
	if err != nil {
		return err
	}
	return eachErr
}

// dump repeats a dump until it is consistent. reset is called before each try.
func (k *kernel) dump(ctx context.Context, proto, msgType int, fill func(*nl.NetlinkRequest), reset func(), each func(m []byte) error) error {
	for try := 1; ; try++ {
		reset()
		err := k.request(ctx, proto, msgType, unix.NLM_F_DUMP, fill, each)
		if !errors.Is(err, netlink.ErrDumpInterrupted) || try == dumpTries {
			return err
		}
	}
}

func (k *kernel) rules(ctx context.Context, family uint8) (rules []rule, err error) {
	err = k.dump(ctx, unix.NETLINK_ROUTE, unix.RTM_GETRULE,
		func(req *nl.NetlinkRequest) { req.AddData(&nl.RtMsg{RtMsg: unix.RtMsg{Family: family}}) },
		func() { rules = nil },
		func(m []byte) error {
			r, err := parseRule(m)
			if err == nil && r.Family == family {
				rules = append(rules, r)
			}
			return err
		})
	if err != nil {
		return nil, fmt.Errorf("podnet: list IPv%d rules: %w", familyVersion(family), err)
	}
	return rules, nil
}

// routes lists the tables that keep reports true for.
func (k *kernel) routes(ctx context.Context, family uint8, keep func(table uint32) bool) (routes []route, err error) {
	err = k.dump(ctx, unix.NETLINK_ROUTE, unix.RTM_GETROUTE,
		func(req *nl.NetlinkRequest) { req.AddData(&nl.RtMsg{RtMsg: unix.RtMsg{Family: family}}) },
		func() { routes = nil },
		func(m []byte) error {
			r, err := parseRoute(m)
			if err == nil && r.Family == family && !r.Dead && keep(r.Table) {
				routes = append(routes, r)
			}
			return err
		})
	if err != nil {
		return nil, fmt.Errorf("podnet: list IPv%d routes: %w", familyVersion(family), err)
	}
	return routes, nil
}

func (k *kernel) addRule(ctx context.Context, r rule) error {
	err := k.request(ctx, unix.NETLINK_ROUTE, unix.RTM_NEWRULE, unix.NLM_F_CREATE|unix.NLM_F_EXCL|unix.NLM_F_ACK, r.encode, nil)
	if err != nil && !errors.Is(err, unix.EEXIST) {
		return fmt.Errorf("podnet: add %v: %w", r, err)
	}
	return nil
}

func (k *kernel) deleteRule(ctx context.Context, r rule) error {
	err := k.request(ctx, unix.NETLINK_ROUTE, unix.RTM_DELRULE, unix.NLM_F_ACK, r.encode, nil)
	if err != nil && !errors.Is(err, unix.ENOENT) {
		return fmt.Errorf("podnet: delete %v: %w", r, err)
	}
	return nil
}

func (k *kernel) putRoute(ctx context.Context, r route) error {
	err := k.request(ctx, unix.NETLINK_ROUTE, unix.RTM_NEWROUTE, unix.NLM_F_CREATE|unix.NLM_F_REPLACE|unix.NLM_F_ACK, r.encode, nil)
	if err != nil {
		return fmt.Errorf("podnet: put %v: %w", r, err)
	}
	return nil
}

func (k *kernel) deleteRoute(ctx context.Context, r route) error {
	if r.Family == unix.AF_INET6 {
		r.Scope = 0
	}
	err := k.request(ctx, unix.NETLINK_ROUTE, unix.RTM_DELROUTE, unix.NLM_F_ACK, r.encode, nil)
	if err != nil && !errors.Is(err, unix.ESRCH) && !errors.Is(err, unix.ENOENT) && !errors.Is(err, unix.ENODEV) {
		return fmt.Errorf("podnet: delete %v: %w", r, err)
	}
	return nil
}

// link is an interface of the pod.
type link struct {
	Index, Master, MTU, TxQueue int
	Name, Kind                  string
	Up, Loopback                bool
}

func (k *kernel) listLinks() ([]link, error) {
	if err := k.links.SetSocketTimeout(requestTimeout); err != nil {
		return nil, err
	}
	list, err := k.links.LinkList()
	for try := 1; errors.Is(err, netlink.ErrDumpInterrupted) && try < dumpTries; try++ {
		list, err = k.links.LinkList()
	}
	if err != nil {
		return nil, fmt.Errorf("podnet: list links: %w", err)
	}
	var links []link
	for _, l := range list {
		a := l.Attrs()
		links = append(links, link{
			Index: a.Index, Master: a.MasterIndex, MTU: a.MTU, TxQueue: a.TxQLen, Name: a.Name, Kind: l.Type(),
			Up: a.RawFlags&unix.IFF_UP != 0, Loopback: a.RawFlags&unix.IFF_LOOPBACK != 0,
		})
	}
	return links, nil
}

// handle of a link, as the netlink package wants it.
func (l link) handle() netlink.Link {
	return &netlink.GenericLink{LinkAttrs: netlink.LinkAttrs{Index: l.Index, Name: l.Name}, LinkType: l.Kind}
}

// networkOrder is how ports and addresses stand in socket diagnostics.
var networkOrder = binary.BigEndian
