
(()=>{const $=(q,r=document)=>[...r.querySelectorAll(q)],W=10000,tip=$('#tip')[0];let a=0,b=1,from=null;
$('rect').forEach(r=>{const t=r.firstChild;r.tip=t.textContent;t.remove()});
const time=s=>{for(const[k,u]of[[1,'s'],[1e-3,'ms'],[1e-6,'us']])if(Math.abs(s)>=k)return+(s/k).toPrecision(4)+' '+u;
return s?+(s*1e9).toPrecision(4)+' ns':'0'};
function draw(){$('.plot').forEach(p=>{const S=+p.dataset.s,svg=$('svg',p)[0],over=$('.over',p)[0];
svg.setAttribute('viewBox',[a*W,0,(b-a)*W,p.dataset.h]);const wide=svg.clientWidth,per=wide/((b-a)*W);over.innerHTML='';
$('rect',p).forEach(r=>{let x=(+r.getAttribute('x')-a*W)*per,w=+r.getAttribute('width')*per;
if(x<0){w+=x;x=0}w=Math.min(w,wide-x);if(w<26||!r.dataset.n||r.dataset.n.length*6.6+9>w&&w<70)return;
const s=document.createElement('span');s.textContent=r.dataset.n;s.className=r.classList[0]+(r.matches('.k')?'':' nk');
s.style.cssText=`left:${x}px;top:${r.getAttribute('y')}px;width:${w}px;background:none`;over.append(s)});
$('.axis',p).forEach(ax=>{const raw=S*(b-a)/Math.max(2,Math.min(9,wide/120)),d=10**Math.floor(Math.log10(raw)),
step=[1,2,5,10].map(m=>m*d).find(s=>s>=raw*.999);ax.innerHTML='';
for(let i=Math.ceil(a*S/step-1e-9);i*step<=b*S;i++){const s=document.createElement('span');s.textContent=time(i*step);
s.style.left=100*(i*step/S-a)/(b-a)+'%';ax.append(s)}})})}
const at=(e,v)=>{const r=v.getBoundingClientRect();return Math.min(1,Math.max(0,(e.clientX-r.left)/r.width))};
$('.view').forEach(v=>{v.onpointerdown=e=>{from=at(e,v);v.setPointerCapture(e.pointerId)};
v.onpointermove=e=>{if(from===null)return;const x=at(e,v),o=$('.over',v)[0],m=$('b',o)[0]||document.createElement('b');
m.style.left=100*Math.min(x,from)+'%';m.style.width=100*Math.abs(x-from)+'%';o.append(m)};
v.onpointerup=e=>{const x=at(e,v),l=Math.min(x,from),r=Math.max(x,from),n=b-a;from=null;
if(r-l>.005){b=a+r*n;a+=l*n}draw()};v.ondblclick=()=>{a=0;b=1;draw()}});
document.addEventListener('pointermove',e=>{const t=e.target.tip;tip.hidden=!t;if(!t)return;tip.textContent=t;
tip.style.left=Math.min(e.clientX+14,innerWidth-tip.offsetWidth-8)+'px';
tip.style.top=(e.clientY+tip.offsetHeight+26>innerHeight?e.clientY-tip.offsetHeight-10:e.clientY+16)+'px'});
$('#crit').forEach(c=>c.onchange=()=>document.body.classList.toggle('crit',c.checked));
addEventListener('resize',draw);draw()})()
