package podnet

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

// setting is a sysctl as it should be. Path is relative to /proc/sys.
type setting struct {
	Path, Value string
	// own is set where it ends with our device, so that what it was need not be kept.
	own bool
}

const (
	conf4 = "net/ipv4/conf/"
	conf6 = "net/ipv6/conf/"

	earlyDemux  = "net/ipv4/tcp_early_demux"
	forwarding4 = conf4 + "all/forwarding"
	forwarding6 = conf6 + "all/forwarding"
)

// sysctls reads and writes /proc/sys on a thread inside the namespace.
type sysctls struct {
	read  func(path string) (value string, ok bool)
	write func(path, value string) error
}

// procSys needs close when it is not used any more.
func procSys() (s sysctls, close func()) {
	var own ownProc
	return sysctls{
		read: func(p string) (string, bool) {
			b, err := os.ReadFile("/proc/sys/" + p)
			return strings.TrimSpace(string(b)), err == nil
		},
		write: func(p, value string) error {
			f, err := os.OpenFile("/proc/sys/"+p, os.O_WRONLY, 0)
			if errors.Is(err, unix.EROFS) {
				f, err = own.open("sys/" + p)
			}
			if err != nil {
				return err
			}
			_, err = f.WriteString(value)
			return errors.Join(err, f.Close())
		},
	}, own.close
}

// settingsFor decides every sysctl, in the order in which they must be written.
//
// tcp_early_demux off: a forwarded packet whose 4-tuple the pod's kernel knows would be tied to that socket, and is then dropped
// instead of forwarded. accept_local and no rp_filter on the device: what the proxy sends has the pod's own source, and answers
// to captured DNS come from where main would not send them; TCP passes the check as it is, since its reverse path runs
// through the same rules. addr_gen_mode: no router solicitation, no random source on the device.
func settingsFor(s sysctls, cfg *Config, w *world, p *plan) []setting {
	list := []setting{{Path: earlyDemux, Value: "0"}}
	dev := func(path, value string) { list = append(list, setting{Path: path, Value: value, own: true}) }
	set := func(path, value string) { list = append(list, setting{Path: path, Value: value}) }

	set(conf4+"all/send_redirects", "0")
	for _, l := range p.layer3 {
		set(conf4+l.Name+"/send_redirects", "0")
		set(conf4+l.Name+"/forwarding", "1")
	}
	dev(conf4+cfg.Device+"/forwarding", "1")
	dev(conf4+cfg.Device+"/accept_local", "1")
	dev(conf4+cfg.Device+"/send_redirects", "0")
	list = append(list, reversePath(s, cfg, w)...)

	dev(conf6+cfg.Device+"/addr_gen_mode", "1")
	dev(conf6+cfg.Device+"/accept_ra", "0")
	dev(conf6+cfg.Device+"/disable_ipv6", "0")
	return append(list, forwarding(s, cfg, w, p)...)
}

// reversePath turns rp_filter off on the device, which has no address. The kernel takes the larger of an interface's value and
// that of "all": "all" must be 0, so the others take it over. Writing "default" also changes those never written, so it comes first.
func reversePath(s sysctls, cfg *Config, w *world) []setting {
	const leaf = "/rp_filter"
	all, ok := s.read(conf4 + "all" + leaf)
	if !ok {
		return nil
	}
	var list []setting
	keep := func(name string) {
		if own, ok := s.read(conf4 + name + leaf); ok {
			list = append(list, setting{Path: conf4 + name + leaf, Value: max(own, all)})
		}
	}
	keep("default")
	for _, l := range w.links {
		if l.Name != cfg.Device {
			keep(l.Name)
		}
	}
	return append(list,
		setting{Path: conf4 + "all" + leaf, Value: "0"},
		setting{Path: conf4 + cfg.Device + leaf, Value: "0", own: true})
}

// forwarding lets IPv6 packets pass between the pod's interfaces and the device. Kernels before 6.17 can only do so for all
// interfaces, and forget routes learned from router advertisements unless accept_ra is 2 by then.
func forwarding(s sysctls, cfg *Config, w *world, p *plan) []setting {
	const force = "/force_forwarding"
	if _, ok := s.read(conf6 + "all" + force); ok {
		list := []setting{{Path: conf6 + cfg.Device + force, Value: "1", own: true}}
		for _, l := range p.layer3 {
			list = append(list, setting{Path: conf6 + l.Name + force, Value: "1"})
		}
		return list
	}
	if _, ok := s.read(forwarding6); !ok {
		return nil
	}
	var list []setting
	for _, l := range p.layer3 {
		if v, _ := s.read(conf6 + l.Name + "/accept_ra"); v == "1" {
			list = append(list, setting{Path: conf6 + l.Name + "/accept_ra", Value: "2"})
		}
	}
	// "all" sets every other one: keep what they were.
	for _, l := range w.links {
		list = append(list, setting{Path: conf6 + l.Name + "/forwarding", Value: "1", own: l.Name == cfg.Device})
	}
	return append(list, setting{Path: conf6 + "default/forwarding", Value: "1"}, setting{Path: forwarding6, Value: "1"})
}

// saved finds what a sysctl was before it was changed.
func (st *State) saved(path string) (SavedSysctl, bool) {
	i := slices.IndexFunc(st.Sysctls, func(s SavedSysctl) bool { return s.Path == path })
	if i < 0 {
		return SavedSysctl{}, false
	}
	return st.Sysctls[i], true
}

// original is what a sysctl was before it was changed, or is if it was not.
func (st *State) original(s sysctls, path string) string {
	if saved, ok := st.saved(path); ok {
		return saved.Old
	}
	v, _ := s.read(path)
	return v
}

// forwards tells for each family whether the pod forwarded before capture, or wants to now.
func (st *State) forwards(s sysctls, w *world, cfg *Config) map[uint8]bool {
	now4, _ := s.read(forwarding4)
	out := map[uint8]bool{unix.AF_INET: now4 == "1", unix.AF_INET6: st.original(s, forwarding6) == "1"}
	for _, l := range w.links {
		if l.Loopback || l.Name == cfg.Device {
			continue
		}
		if st.original(s, conf4+l.Name+"/forwarding") == "1" {
			out[unix.AF_INET] = true
		}
		if st.original(s, conf6+l.Name+"/force_forwarding") == "1" {
			out[unix.AF_INET6] = true
		}
	}
	return out
}

// differing are the settings that are not as they should be. What does not exist here cannot differ, except
// tcp_early_demux, without which /proc/sys is not the real one.
func differing(s sysctls, want []setting) []setting {
	var out []setting
	for _, w := range want {
		if have, ok := s.read(w.Path); ok && have != w.Value || !ok && w.Path == earlyDemux {
			out = append(out, w)
		}
	}
	return out
}

// putSettings writes the settings that differ, keeps in st what they were, and counts them. Each is read when its turn has
// come, since writing one may change others.
func putSettings(s sysctls, st *State, list []setting) (n int, err error) {
	for _, w := range list {
		old, ok := s.read(w.Path)
		if !ok && w.Path == earlyDemux {
			return n, fmt.Errorf("podnet: sysctl %s: %w", w.Path, fs.ErrNotExist)
		}
		if !ok || old == w.Value {
			continue
		}
		st.save(w, old)
		n++
		if err := s.write(w.Path, w.Value); err != nil {
			return n, fmt.Errorf("podnet: set sysctl %s to %s: %w", w.Path, w.Value, err)
		}
	}
	return n, nil
}

// save keeps what a sysctl was before it was changed for the first time.
func (st *State) save(w setting, old string) {
	if _, known := st.saved(w.Path); !known && !w.own {
		st.Sysctls = append(st.Sysctls, SavedSysctl{Path: w.Path, Old: old, New: w.Value})
	}
}

// guess takes the kernel's defaults for what sysctls were, where they were changed by an Attachment whose State is lost.
func (st *State) guess(s sysctls, list []setting) {
	for _, w := range list {
		if _, ok := s.read(w.Path); ok {
			st.save(w, kernelDefault(s, w.Path))
		}
	}
}

// keepForwarding notes what "all" was: its change resets every interface, and restore must not undo the pod's own wish.
func keepForwarding(s sysctls, st *State) {
	if _, known := st.saved(forwarding4); known {
		return
	}
	if v, ok := s.read(forwarding4); ok {
		st.Sysctls = append(st.Sysctls, SavedSysctl{Path: forwarding4, Old: v})
	}
}

func kernelDefault(s sysctls, p string) string {
	if p == earlyDemux {
		return "1"
	}
	v, ok := s.read(path.Join(path.Dir(path.Dir(p)), "default", path.Base(p)))
	if !ok {
		v, _ = s.read(p)
	}
	return v
}

// restore puts every sysctl back that still has the value it was given, latest change first.
func restore(s sysctls, st *State) error {
	now4, _ := s.read(forwarding4)
	noted, _ := st.saved(forwarding4)
	var errs []error
	for _, saved := range slices.Backward(st.Sysctls) {
		old := saved.Old
		if strings.HasPrefix(saved.Path, conf4) && path.Base(saved.Path) == "forwarding" && now4 != noted.Old {
			old = now4
		}
		now, ok := s.read(saved.Path)
		if !ok || saved.New == "" || now != saved.New || now == old {
			continue
		}
		if err := s.write(saved.Path, old); err != nil && !errors.Is(err, fs.ErrNotExist) {
			errs = append(errs, fmt.Errorf("podnet: restore sysctl %s: %w", saved.Path, err))
		}
	}
	return errors.Join(errs...)
}

// onSysctls runs f inside the namespace.
func (k *kernel) onSysctls(ctx context.Context, f func(s sysctls) error) error {
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	return k.inside(func() error {
		s, done := procSys()
		defer done()
		return f(s)
	})
}
